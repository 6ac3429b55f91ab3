"""report.html of an evaluation: the table of all encoders, then each one's figures and pictures."""

from collections.abc import Sequence
from html import escape
from typing import Any

from patchsight_train.judge.confusion import most_confused
from patchsight_train.judge.judgement import Judgement
from patchsight_train.judge.ranking import FEWEST, Point, ranking_chart
from patchsight_train.judge.robustness import robustness_chart
from patchsight_train.judge.sheets import CAPTIONS
from patchsight_train.webpage import page, picture

PROTOCOL = (
    "k-NN is DINO's (arXiv:2104.14294): eval transform on gallery and query, cosine, votes weighted "
    "exp(similarity / 0.07). The linear probe is the best of many heads behind a batch norm, chosen on a tenth of the "
    "training images. Intervals hold 95 % (Wilson)."
)
MEASURES = {
    "rankme": ("RankMe", "dimensions in use, arXiv:2210.02885"),
    "intrinsic_dimension": ("Intrinsic dimension", "of the surface they lie on, TwoNN"),
    "uniformity": ("Uniformity", "less is more evenly spread, arXiv:2005.10242"),
    "feature_std": ("Feature std · √D", "1 is healthy, 0 is collapsed"),
    "off_diagonal_correlation": ("Correlation of channels", "mean of |r|; 0 is disentangled"),
    "information_mean": ("Bits of the class", "in a channel, mean"),
    "information_max": ("Bits of the class", "in the best channel"),
}


def render(
    judged: Sequence[tuple[Judgement, dict[str, bytes]]], train: str, test: str, commit: str, points: Sequence[Point]
) -> str:
    """judged: each with its pictures by name, PNG. train, test: what the two sides are called. points: the evaluations
    that the sources' own trainings logged."""
    first = judged[0][0].numbers
    title = " · ".join(judgement.subject.name for judgement, _ in judged)
    facts = {
        "Gallery": f"{train}, {first['train']['images']:,} images",
        "Queries": f"{test}, {first['test']['images']:,} images",
        "Classes": f"{len(judged[0][0].subject.class_names)}",
        "Code": commit,
    }
    listed = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    header = f"""<header>
<p class="brand"><span>patchsight · evaluation</span></p>
<h1>{escape(title)}</h1>
<p class="lead">{PROTOCOL}</p>
<dl class="facts">{listed}</dl>
</header>"""
    several = _comparison([judgement for judgement, _ in judged]) if len(judged) > 1 else ""
    content = several + "".join(_subject(*entry) for entry in judged) + _ranking(points)
    return page(f"{title} · evaluation", header, content)


def _comparison(judged: Sequence[Judgement]) -> str:
    rows = []
    for judgement in judged:
        numbers = judgement.numbers
        rows.append(
            [judgement.subject.name, _headline(numbers), _share(numbers["linear"]["best"], "test"),
             *(f"{numbers['representation'][name]:.3g}" for name in ("rankme", "intrinsic_dimension", "uniformity"))]
        )  # fmt: skip
    heads = ["encoder", "20-NN", "linear", "RankMe", "intrinsic dimension", "uniformity"]
    return f"<section><h2>Side by side</h2>{table(heads, rows)}</section>\n"


def _subject(judgement: Judgement, pictures: dict[str, bytes]) -> str:
    numbers, subject = judgement.numbers, judgement.subject
    best, kind = numbers["linear"]["best"], subject.recommended
    tiles = [
        (f"{judgement.headline.headline}-NN", _headline(numbers, interval=False), _interval(numbers["knn"][kind])),
        ("Linear probe", f"{best['test']:.1%}", f"{_span(best['interval_95'])}; {best['kind']}, rate {best['rate']:g}"),
    ]
    tiles += [
        (f"{f['shots']} a class", f"{f['accuracy']:.1%}", f"{len(f['draws'])} draws") for f in numbers["few_shot"]
    ]
    tiles += [(name, f"{numbers['representation'][key]:.3g}", what) for key, (name, what) in MEASURES.items()]
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    about = " · ".join(f"{key}: {value}" for key, value in subject.about.items())
    figures = "".join(picture(png, name, CAPTIONS[name]) for name, png in pictures.items())
    return f"""<section><h2>{escape(subject.name)}</h2>
<p class="state">{escape(about)}</p>
<dl class="tiles">{shown}</dl>
<h2>By k, and by kind of embedding</h2>{_by_k(judgement)}
<h2>Linear heads</h2>{_heads(numbers["linear"])}
<h2>Confused most</h2>{_confused(judgement)}
{_left_out(numbers)}</section>
{_harmed(judgement)}<section><h2>Pictures</h2><div class="pictures">{figures}</div></section>
"""


def _by_k(judgement: Judgement) -> str:
    kinds = judgement.numbers["knn"]
    ks = list(next(iter(kinds.values()))["accuracy"])
    rows = [
        [f"{kind} (recommended)" if kind == judgement.subject.recommended else kind,
         *(f"{found['accuracy'][k]:.1%} ({_span(found['interval_95'][k])})" for k in ks)]
        for kind, found in kinds.items()
    ]  # fmt: skip
    return table(["embedding", *(f"k = {k}" for k in ks)], rows)


def _heads(linear: dict[str, Any]) -> str:
    rates = sorted({tried["rate"] for tried in linear["heads"]})
    kinds = list(dict.fromkeys(tried["kind"] for tried in linear["heads"]))
    test = {(tried["kind"], tried["rate"]): tried["test"] for tried in linear["heads"]}
    rows = [[kind, *(f"{test[kind, rate]:.1%}" for rate in rates)] for kind in kinds]
    note = (
        f"Accuracy on the test images by learning rate. The batch norm is folded into the linear layer afterwards: its "
        f"outputs differ by {linear['folding_error']:.1g} of the largest."
    )
    return f'{table(["feature", *(f"{rate:g}" for rate in rates)], rows)}<p class="when">{note}</p>'


def _confused(judgement: Judgement) -> str:
    confused = most_confused(judgement.confusion, judgement.subject.class_names)
    rows = [[a, b, f"{n:,} of {of:,}"] for a, b, n, of in confused]
    return table(["class", "taken for", "images"], rows) if rows else "<p>Nothing: all were told rightly.</p>"


def _harmed(judgement: Judgement) -> str:
    if not judgement.disturbed:
        return ""
    panels = robustness_chart(judgement.disturbed)
    return f'<section><h2>What harm to a picture does</h2><div class="charts">{panels}</div></section>\n'


def _ranking(points: Sequence[Point]) -> str:
    """Nothing for fewer evaluations than have a rank correlation."""
    if len(points) < FEWEST:
        return ""
    note = (
        "Every evaluation that these runs logged while they trained, by label-free measures against 20-NN. ρ is "
        "Spearman's; what does not beat that of the step is no help in choosing a checkpoint."
    )
    heading = "<h2>Could one have chosen without labels?</h2>"
    return f'<section>{heading}<p class="when">{note}</p><div class="charts">{ranking_chart(points)}</div></section>\n'


def _left_out(numbers: dict[str, Any]) -> str:
    lines = [
        f"left out of {side}: {entry['name']}: {entry['reason']}"
        for side in ("train", "test") for entry in numbers[side]["skipped"]
    ]  # fmt: skip
    missing = numbers["classes_only_in_test"]
    lines += [f"always wrong, as the gallery has none: {', '.join(missing)}"] if missing else []
    return "".join(f'<p class="when">{escape(line)}</p>' for line in lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As HTML; the first column names the row."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _headline(numbers: dict[str, Any], interval: bool = True) -> str:
    found = numbers["knn"][numbers["recommended"]]
    share = f"{found['accuracy'][str(found['headline_k'])]:.1%}"
    return f"{share} ({_interval(found)})" if interval else share


def _interval(found: dict[str, Any]) -> str:
    return _span(found["interval_95"][str(found["headline_k"])])


def _share(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:.1%} ({_span(found['interval_95'])})"


def _span(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
