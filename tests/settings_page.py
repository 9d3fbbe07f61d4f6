"""docs/settings.md from the argument dataclasses of the recipes; `python tests/settings_page.py` writes it anew."""

import ast
import dataclasses
import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "settings.md"
LIKE_TRAIN_GPT = ("plan.py", "train_bert.py")  # take its settings, and list what differs
_HEAD = """# All settings

Each is a flag, or a key of one YAML file (`--config FILE.yaml`; flags win). Booleans take `true` or `false`, lists take
several values. Where the default is -, the text says what happens. Written by `python tests/settings_page.py`.
"""


def page() -> str:
    parts, train_gpt = [_HEAD], {}
    for path in sorted((REPOSITORY / "recipes").glob("*.py"), key=lambda p: (p.stem != "train_gpt", p.stem)):
        rows = settings_of(path)
        parts.append(f"## {path.name}\n")
        if path.stem == "train_gpt":
            train_gpt = rows
        elif path.name in LIKE_TRAIN_GPT:
            rows = {name: row for name, row in rows.items() if train_gpt.get(name) != row}
            for_encoders = " (for encoders as `train_bert.py`)" if path.stem == "plan" else ""
            parts.append(f"As `train_gpt.py`{for_encoders}, but for:\n")
        lines = ["| flag | default | what it decides |", "|---|---|---|"]
        lines += [f"| `--{name}` | {default} | {help} |" for name, (default, help) in rows.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def settings_of(recipe: Path) -> dict[str, tuple[str, str]]:
    """Default and help of each setting that a recipe parses, in its order."""
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = [node for node in ast.walk(ast.parse(recipe.read_text("utf-8"))) if isinstance(node, ast.Call)]
    parsed = [call for call in calls if getattr(call.func, "id", None) == "parse_arguments"]
    assert parsed, f"{recipe}: parses no settings"
    types = []
    for argument in (argument for call in parsed for argument in call.args):
        if isinstance(argument, ast.Starred):
            types += getattr(module, argument.value.id)
        elif isinstance(argument, ast.Name):
            types.append(getattr(module, argument.id))
    named = [word.value.id for call in parsed for word in call.keywords if word.arg == "defaults"]
    other = getattr(module, named[0]) if named else {}
    # Of a setting that is parsed twice, the first stands.
    fields = {field.name: field for one in reversed(types) for field in dataclasses.fields(one)}
    fields = {field.name: fields[field.name] for one in types for field in dataclasses.fields(one)}
    return {
        name: (_default(field, other), field.metadata["help"].replace("|", "\\|")) for name, field in fields.items()
    }


def _default(field: dataclasses.Field, other: dict) -> str:
    if field.name in other:
        return f"`{other[field.name]}`" if other[field.name] else "-"
    if field.default_factory is not dataclasses.MISSING:
        return " ".join(f"`{value}`" for value in field.default_factory()) or "-"
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return "-" if field.default is None else f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
