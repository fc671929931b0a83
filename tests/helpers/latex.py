"""A strict small reader of LaTeX tables: what it refuses would not compile, or would print something else."""

import re

COMMANDS = {"toprule", "midrule", "bottomrule", "mathbf", "pm"}  # of the table itself
SIGNS = {"textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar", "textasciigrave"}
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}$&%#_^~]|[^\\{}$&%#_^~]+", re.DOTALL)


def rows_of(tex: str) -> list[list[str]]:
    """The cells of the one tabular in `tex`, row by row. Fails where braces or dollars do not pair within a cell, for a
    command that is not known, a sign that is not escaped, a formula outside of dollars and rows of other lengths."""
    body = "\n".join(line for line in tex.splitlines() if not line.startswith("%"))
    whole = re.fullmatch(r"\\begin\{tabular\}\{(l?[lrc]*)\}\n(.*)\n\\end\{tabular\}", body.strip(), re.DOTALL)
    assert whole, "not one tabular"
    spec, lines = whole[1], whole[2].split("\n")
    assert lines[0] == r"\toprule" and lines[2] == r"\midrule" and lines[-1] == r"\bottomrule"
    assert r"\usepackage{booktabs}" in tex
    rows = [_cells(line) for line in [lines[1], *lines[3:-1]]]
    assert {len(row) for row in rows} == {len(spec)}
    return rows


def _cells(line: str) -> list[str]:
    assert line.endswith(r" \\")
    text = line[: -len(r" \\")]
    assert text.lstrip()[:1] not in ("[", "*"), "would belong to the line break before it"
    cells, depth, math = [""], 0, False
    tokens = TOKEN.findall(text)
    assert "".join(tokens) == text
    for token in tokens:
        if token == "&":
            assert depth == 0 and not math
            cells.append("")
            continue
        cells[-1] += token
        if token in "{}":
            depth += 1 if token == "{" else -1
            assert depth >= 0
        elif token == "$":
            math = not math
        elif len(token) > 2 and token[0] == "\\":
            assert token[1:] in (COMMANDS if math else SIGNS), token
        elif token[0] == "\\":
            assert token[1] in "&%$#_{}", token
        else:
            assert not set(token) & set("%#_^~"), token
    assert depth == 0 and not math
    return [cell.strip() for cell in cells]
