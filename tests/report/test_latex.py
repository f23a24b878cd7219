"""The table in LaTeX goes through LaTeX."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from distillbench.leaderboard import render
from distillbench.listing import board_of
from distillbench.published import published_store

DOCUMENT = r"""\documentclass{article}
\usepackage[T1]{fontenc}\usepackage[utf8]{inputenc}\usepackage{booktabs}\usepackage{graphicx}
\begin{document}
%s
\end{document}
"""


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here (Debian: texlive-latex-base, texlive-latex-recommended)")
@pytest.mark.parametrize("track", ["mixture2d", "digits"])
def test_a_published_board_compiles(track: str, tmp_path: Path):
    board = board_of(track, published_store(track))
    text = render(board, "latex")
    assert r"\toprule" in text
    assert re.search(r"\\textbf\{[\d.]+ \$\\pm\$[\d.]+\}", text), "the best in bold, with its interval"
    assert re.search(r"\\underline\{[\d.]+ \$\\pm\$[\d.]+\}", text), "the second underlined, with its interval"
    assert text.count(r"\begin{tabular}") == 2 * len(board.budgets), "scores, and costs below them"
    (tmp_path / "table.tex").write_text(DOCUMENT % text, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "table.pdf").stat().st_size > 10_000
    assert "Overfull" not in done.stdout, "wider than the page"
