"""The page of a report: its sections and figures, well-formed, sealed, escaped, and as a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from report_material import write_retrieval, write_run
from tiny import check, leave_out_when_fast

from ds_embed.settings import ReportArguments
from ds_embed.tools.report.build import build_report


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """The report with every section, of a run with an evil name: its path and its text."""
    folder = tmp_path_factory.mktemp("report")
    flags = write_retrieval(folder / "OUT" / "consumed_samples480")
    run = write_run(folder / "run <b>&$x$", validated=(20, 40, 60))
    path, num_charts = build_report(ReportArguments(run=str(run), **flags))
    assert num_charts == len(list(path.parent.glob("*.png"))) == 13
    return path, path.read_text(encoding="utf-8")


class Strict(HTMLParser):
    """Every element that is opened is closed, in order; ids are unique; nothing is loaded from elsewhere."""

    VOID = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_self_contained_and_escaped(full_report):
    page = full_report[1]
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert not parser.open and len(set(parser.ids)) == len(parser.ids)
    assert parser.links and all(
        link[0] == "#" and link[1:] in parser.ids for link in parser.links if link[:5] != "data:"
    )
    assert not {"script", "link", "iframe"} & parser.tags
    assert "://" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "query 0 &lt;script&gt;" in page and "document 0 &lt;script&gt;" in page and "run &lt;b&gt;&amp;$x$" in page


def test_sections_and_figures(full_report):
    page = full_report[1]
    titles = re.findall(r'<h2 id="section-\d">(.*?)</h2>', page)
    wanted = ["Run", "Training", "Retrieval while training", "Speed", "Similarities", "Documents", "Worst queries"]
    assert titles == wanted and "quiet missing" not in page
    shown = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', page))
    assert shown["Validation nDCG@10"] == "0.5000" and shown["Validation loss"] == "4.0000, best 3.3333 (step 20)"
    assert shown["Real tokens per second, median"] == "1,000" and shown["Time in steps"] == "0:00:30"
    assert shown["Ranks and ZeRO"] == "ZeRO-2" and shown["Precision"] == "bfloat16"
    assert page.count("Logarithmic axis.") == 1  # of the loss; the gradient norm stays within one decade


def test_worst_queries_show_what_was_found_instead(full_report):
    article = re.search(r"<article>.*?</article>", full_report[1], re.DOTALL)[0]
    assert "query 0 " in article and len(re.findall("<li", article)) == 4
    assert re.findall(r"rank (\d+),", article) == ["1", "2", "3", "300"]
    last = article[article.rindex("<li") :]
    assert 'class="right"' in last and "-1.000" in last and "document 0 " in last
    assert article.count('class="right"') == 1


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (375, 1100)  # pixels: a phone, a desk
# Run in the page: what is drawn, what lies outside of the screen.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const box = element => element.getBoundingClientRect();
  const charts = [...document.querySelectorAll("figure img")].filter(img => img.complete && img.naturalWidth > 0);
  const wide = [...document.querySelectorAll("body *")].filter(element => box(element).right > innerWidth + 1);
  parent.postMessage({width: innerWidth, charts: charts.length, drawn: charts.filter(img => box(img).height > 80).length,
    wide: wide.map(element => element.tagName), title: document.title}, "*");
}, 200));
</script>
"""


def browse(path, folder, *flags):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", f"file://{path}"]
    return check(subprocess.run(command, capture_output=True, text=True, timeout=600))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not seen in a browser")
def test_browser_shows_everything_at_two_widths(full_report, tmp_path):
    leave_out_when_fast()
    import matplotlib.image

    # Through a plain name: the folder's has characters that a URL would need escaped.
    page = shutil.copy(full_report[0], tmp_path / "report.html")
    shown = browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1100,2000")
    assert ":CONSOLE" not in shown.stderr, shown.stderr
    picture = matplotlib.image.imread(tmp_path / "page.png")
    assert picture.shape[:2] == (2000, 1100) and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100

    text = full_report[1]
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    frames = "".join(f'<iframe src="probed.html" width="{w}" height="900" style="border:0"></iframe>' for w in WIDTHS)
    listen = "addEventListener('message', e => document.body.append('SE' + 'EN' + JSON.stringify(e.data) + 'END'))"
    (tmp_path / "frames.html").write_text(f"<script>{listen}</script><body>{frames}</body>")
    dom = browse(tmp_path / "frames.html", tmp_path, "--dump-dom", "--window-size=1500,1000").stdout
    seen = {one["width"]: one for one in map(json.loads, re.findall("SEEN(.*?)END", html.unescape(dom)))}
    assert set(seen) == set(WIDTHS)
    for one in seen.values():
        assert (one["charts"], one["drawn"], one["wide"]) == (13, 13, []), one
        assert one["title"] == "run <b>&$x$: training report"
