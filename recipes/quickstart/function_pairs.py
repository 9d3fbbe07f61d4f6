"""Extracts pairs from a Python file: the first sentence of a docstring, and the function's source without it."""

import ast
import collections
import inspect
import re
import tokenize
import warnings
from typing import NamedTuple

# Limits on usable pairs.
LIMITS = {"min_query_words": 3, "max_query_words": 40, "max_doc_characters": 8000, "max_test_per_file": 10}

# A full stop after one of these does not end a sentence, even in front of a capital letter.
ABBREVIATIONS = {"e.g.", "i.e.", "cf.", "vs.", "al.", "approx.", "resp.", "incl.", "a.k.a.", "w.r.t."}
ABBREVIATIONS |= {"fig.", "eq.", "eqs.", "sec.", "ref.", "refs.", "no.", "vol.", "dr.", "mr.", "mrs."}
# A capital, digit or bracket must follow: "numpy. then" is more often a typo than the end of a sentence.
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[^a-z\s])")
# Docstrings of wrapped functions often open with the call itself: "relu(input, inplace=False) -> Tensor".
SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)(\s*->.*)?:?$")
# Lines that end a docstring's prose without a blank line before them.
SECTION = re.compile(
    r"(args?|arguments|parameters|returns?|raises|yields|examples?|notes?|inputs?|outputs?|shape)\s*:+\s*$"
    r"|:(param|type|returns?|rtype|raises|args?|keyword|kwarg|meta|ivar|var)\b"
    r"|>>>|\.\. |[-*+] |[-=~^]{3,}\s*$|@"
    # One argument's entry: "input_ids (`torch.Tensor`, *optional*):".
    r"|[\w`*]+ \(.+\):(\s|$)",
    re.IGNORECASE,
)
ROLE = re.compile(r":[\w:]+:`[~!]?([^`<]*[^`<\s])(?:\s*<[^`]*>)?`")


class Pair(NamedTuple):
    """One query, the document that answers it, and the document's id."""

    doc_id: str
    query: str
    document: str


def first_sentence(docstring):
    """The first sentence on one line, without reST markup; empty if the docstring opens with no prose."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    if len(paragraphs) > 1 and SIGNATURE.match(" ".join(paragraphs[0].split())):
        del paragraphs[0]
    prose = []
    for line in paragraphs[0].splitlines():
        if SECTION.match(line.strip()):
            break
        prose.append(line)
    text = ROLE.sub(r"\1", " ".join(" ".join(prose).split())).replace("`", "")
    for match in SENTENCE_END.finditer(text):
        last_word = text[: match.end()].split()[-1].lstrip("(['\"").lower()
        if last_word not in ABBREVIATIONS:
            return text[: match.end()]
    return text


def says_nothing(statements):
    """True if a function's body, apart from its docstring, only passes or raises NotImplementedError."""
    for statement in statements:
        if isinstance(statement, ast.Pass):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if not isinstance(statement, ast.Raise) or "NotImplementedError" not in names:
            return False
    return True


def functions_of(tree):
    """Yield (qualified name, node) of functions and methods, in file order.

    Nested functions are omitted: their text is part of the outer document, so two documents would answer one query.
    """
    waiting = [("", node) for node in reversed(tree.body)]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
            continue
        if isinstance(node, ast.ClassDef):
            prefix += node.name + "."
        # Descend into classes, and into `if` and `try` around definitions.
        inner = (ast.stmt, ast.ExceptHandler)
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, inner)]
        waiting.extend((prefix, child) for child in reversed(children))


def document_of(node, lines):
    """The function's source without its docstring, moved to the left margin.

    Starts at `def`: decorators are boilerplate that would use up the first tokens of a truncated text, and
    some carry the documentation as an argument. Returns None if the docstring shares a line with code.
    """
    docstring = node.body[0]
    # The parser counts columns in UTF-8 bytes.
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].strip()
    if after and not after.startswith(b"#"):
        return None
    head = lines[node.lineno - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : node.end_lineno]
    while body and not body[0].strip():
        del body[0]
    margin = lines[node.lineno - 1][: node.col_offset]
    return "\n".join(line.removeprefix(margin).rstrip() for line in head + body)


def judge(node, lines):
    """(query, document, None) for a function, or (None, None, the rule that drops it)."""
    docstring = ast.get_docstring(node, clean=False)
    if not docstring or not docstring.strip():
        return None, None, "no docstring"
    query = first_sentence(docstring)
    num_words = sum(any(letter.isalpha() for letter in word) for word in query.split())
    # Control characters and lone surrogates are not printable; the latter cannot be written as UTF-8.
    if num_words < LIMITS["min_query_words"] or not query.isprintable():
        return None, None, "query too short or not prose"
    if num_words > LIMITS["max_query_words"]:
        return None, None, "query too long"
    if says_nothing(node.body[1:]):
        return None, None, "body only passes or is not implemented"
    document = document_of(node, lines)
    if document is None:
        return None, None, "docstring shares a line with code"
    if len(document) > LIMITS["max_doc_characters"]:
        return None, None, "document too long"
    return query, document, None


def read_file(file):
    """([Pair], counts) for one (relative path, path)."""
    relative_path, path = file
    counts = collections.Counter(files=1)
    try:
        with tokenize.open(path) as opened:
            source = opened.read()
        with warnings.catch_warnings():
            # Warnings about invalid escapes in other people's code are of no use here.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        # This includes files that need a newer Python.
        counts["files that do not parse"] += 1
        return [], counts
    # Not splitlines(): it also breaks at form feeds, which the parser does not count as lines.
    lines = source.split("\n")
    pairs, seen = [], collections.Counter()
    for name, node in functions_of(tree):
        counts["functions"] += 1
        seen[name] += 1
        query, document, dropped_by = judge(node, lines)
        if dropped_by:
            counts[f"dropped: {dropped_by}"] += 1
            continue
        # Setters, and versions under `if`, repeat a name.
        suffix = f"#{seen[name]}" if seen[name] > 1 else ""
        pairs.append(Pair(f"{relative_path}:{name}{suffix}", query, document))
    return pairs, counts
