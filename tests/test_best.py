"""Which validations are the best, when training stops, and what a resumed run takes over."""

import json
import math

from ds_embed.training.best import BestValidations, Kept


def test_which_are_the_best():
    def after(values, **settings):
        best = BestValidations(**{"metric": "nDCG@10", "top_k": 2} | settings)
        saved = [best.add(step, step * 4, value) for step, value in enumerate(values, start=1)]
        return best, saved

    best, saved = after([0.3, 0.5, 0.5, 0.4, math.nan, 0.6])
    assert saved == [True, True, True, False, False, True]
    assert best.kept == [Kept(6, 24, 0.6), Kept(2, 8, 0.5)] and best.last_validation == 6
    best, saved = after([math.nan, 0.2])
    assert saved == [False, True] and best.steps == {2}
    best, saved = after([3.0, 2.0, 2.5, 1.0], metric="val_loss")
    assert [kept.step for kept in best.kept] == [4, 2] and saved == [True] * 4
    assert after([1.0, 2.0], top_k=0)[1] == [False, False]
    best = BestValidations(metric="nDCG@10", top_k=1)
    assert not best.add(0, 0, 0.9) and best.kept == [] and best.reference is None

    def stops_at(values, **settings):
        return next((n for n in range(1, len(values) + 1) if after(values[:n], **settings)[0].is_exhausted), None)

    values = [0.5, 0.505, 0.509, 0.52, 0.51, 0.51]
    assert stops_at(values, patience=2, min_delta=0.01) == 3
    assert stops_at(values, patience=2) == 6 and stops_at(values, patience=3) is None and stops_at(values) is None
    assert stops_at([5.0, 4.9, 4.5], metric="val_loss", patience=1, min_delta=0.2) == 2
    assert stops_at([math.nan, math.nan], patience=2) == 2


def test_best_of_a_resumed_run(caplog):
    best = BestValidations(metric="nDCG@10", data="a", top_k=2, patience=3)
    for step, value in ((10, 0.5), (20, 0.6), (30, 0.4)):
        best.add(step, step * 4, value)
    state = json.loads(json.dumps(best.state()))
    fresh = BestValidations(metric="nDCG@10", data="a", top_k=2, patience=3)
    assert fresh.restored(state, {10, 20, 30}) == best and fresh.restored(None, {10}) == fresh
    assert fresh.restored(state, {10, 30}).kept == [Kept(10, 40, 0.5)] and "step 20 was among the best" in caplog.text
    one = BestValidations(metric="nDCG@10", data="a", top_k=1).restored(state, {10, 20, 30})
    assert one.steps == {20} and one.num_without_better == 1 and not one.is_exhausted
    # Other files or another measure: not comparable.
    for other in (dict(metric="nDCG@10", data="b"), dict(metric="RR@10", data="a")):
        caplog.clear()
        anew = BestValidations(**other, top_k=1, patience=1).restored(state, {10, 20, 30})
        assert anew.kept == [] and anew.reference is None and anew.last_validation == 30
        assert "starts over" in caplog.text
    off = BestValidations().restored(state, {10, 20, 30})  # without validation from here on: still kept
    assert off.steps == {10, 20} and off.state() == state
