"""docs/settings.md lists every flag of every recipe, as it is."""

import settings_page
from tiny import REPOSITORY


def test_the_page_is_up_to_date():
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "run python tests/settings_page.py"


def test_every_flag_of_every_recipe_is_on_it():
    sections = settings_page.PAGE.read_text(encoding="utf-8").split("\n## ")
    listed = {section.split("\n")[0]: section for section in sections[1:]}
    assert listed.keys() == {path.name for path in (REPOSITORY / "recipes").glob("*.py")}
    for path in (REPOSITORY / "recipes").glob("*.py"):
        where = listed[path.name] + (listed["train_gpt.py"] if path.name in settings_page.LIKE_TRAIN_GPT else "")
        for name, (_, help) in settings_page.settings_of(path).items():
            assert f"| `--{name}` |" in where and help.strip()
