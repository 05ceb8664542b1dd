"""The report of a trace as one page that needs nothing else: no script, no network, everything escaped.

What is in a suspect's file (names of tensors) was written by whoever leaked it: here it is text, and nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from strongroom.cli.output import counted, number, size
from strongroom.core.clock import text

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#5d6670;--line:#d8dde3;--page:#fff;--bad:#b3261e;
  --dot:#3b6fb6;--dot2:#b67f3b}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#9aa4ae;--line:#353b42;--page:#15181b;
  --bad:#ff8a80;--dot:#8ab4f8;--dot2:#f0b878}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;
  margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;line-height:1.3}
h2{font-size:1.1rem;margin-top:2rem}
p.soft,td.soft,text.soft{color:var(--soft);fill:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.9rem;display:block;overflow-x:auto}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500}
td.n{text-align:right;font-variant-numeric:tabular-nums}
code{font-size:.85em;overflow-wrap:anywhere}
pre{white-space:pre-wrap}
svg{width:100%;height:auto}
.named{color:var(--bad)}
.word{color:var(--dot)}
.stamp{color:var(--dot2)}
table.facts td:first-child{white-space:nowrap;color:var(--soft)}
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 300, 110, 40
_HIGHEST = 300.0  # orders of magnitude in the plot: nobody doubts beyond that, and the threshold has to be seen
_PLOTTED = 4000
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_TENSORS = 500


def page(found: dict[str, Any]) -> str:
    """HTML of the report `found`, as ``strongroom trace --json`` has it."""
    from strongroom.cli.trace import verdict

    parts = [
        f"<h1{' class=named' if found['accused'] else ''}>{escape(verdict(found))}</h1>",
        f"<p class=soft>{escape(_summary(found))}</p>",
        _recorded(found),
        _accused(found),
        _plot(found),
        "" if found["text"] else _transformed(found),
        _wrong(found),
        _preserve(found),
        _tensors(found["tensors"]),
        _versions(found["versions"]),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>Trace of {escape(found['suspect']['name'])}</title><style>{_STYLE}</style></head><body>"
        + "".join(parts)
        + "</body></html>\n"
    )


def _summary(found: dict[str, Any]) -> str:
    from strongroom.cli.trace import versions_that_fit, written

    suspect = found["suspect"]
    if found["text"]:
        return (
            f"{suspect['name']}, {size(suspect['bytes'])}: {written(found['text'])}. Compared with {found['weights']}, "
            f"{number(found['positions_used'])} of {number(found['positions'])} positions, "
            f"{number(found['elements'])} elements, {number(found['candidates'])} candidates."
        )
    about = f"{suspect['name']}, {counted(suspect['tensors'], 'tensor')}, {size(suspect['bytes'])}. "
    if not found["weights"]:
        return about
    return (
        about
        + (
            f"Compared with {found['weights']}: likeness {found['likeness']:.4f}, {number(found['positions_used'])} of "
            f"{number(found['positions'])} positions, {number(found['elements'])} elements, "
            f"{number(found['candidates'])} candidates."
        )
        + (f" {fitting[:1].upper()}{fitting[1:]}." if (fitting := versions_that_fit(found)) else "")
    )


def _recorded(found: dict[str, Any]) -> str:
    """When it was found out, for whom, with whose consent; and where the log has that."""
    asked = found["request"]
    none = "no request: nobody is named without one" if found["withheld"] else "no request: policy asked for none"
    rows = [
        ("Traced", f"{text(found['at'])} (UTC)"),
        ("By", found["by"]),
        ("Under", f"request {asked['id']} of {asked['by']}" if asked else none),
        *([("Approved by", ", ".join(asked["approved_by"]))] if asked else []),
        ("Room", found["room"]),
        ("Recorded as", f"entry {found['entry']} of its log"),
        ("Leaf hash", f"{found['leaf']} (strongroom log prove {found['entry']} says that it is in the log)"),
    ]
    return "<h2>This trace</h2>" + _table((), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    def cell(at: int, value: object) -> str:
        return f"<td{' class=n' if at in numbers else ''}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(each)}</th>" for each in header)
    table = f"<table><thead><tr>{head}</tr></thead>" if header else "<table class=facts>"
    body = "".join("<tr>" + "".join(cell(at, each) for at, each in enumerate(row)) + "</tr>" for row in rows)
    return f"{table}<tbody>{body}</tbody></table>"


def _accused(found: dict[str, Any]) -> str:
    if not found["accused"]:
        return ""
    from strongroom.cli.trace import chance, what_chance_is

    rows = [
        (
            each["holder"],
            each["person"],
            f"{each['layer1']['sigma']:.1f} σ",
            f"{each['layer2']['z']:.1f} σ",
            chance(each["false_accusation"]),
        )
        for each in found["accused"]
    ]
    header = ("Holder", "Person", "Code word", "Stamp", "Chance that this is wrong, at most")
    releases = [(each["holder"], item) for each in found["accused"] for item in each["releases"]]
    missing = [each["holder"] for each in found["accused"] if not each["releases"]]
    shown = "<h2>Who</h2>" + _table(header, rows, numbers=(2, 3, 4))
    shown += (
        f"<p class=soft>The chance is {escape(what_chance_is(found))} (once in a thousand million). A copy carries its "
        "holder's code word, and a plaintext copy a stamp as well; σ is how many standard deviations each is beyond "
        "what a stranger's would be.</p>"
    )
    if releases:
        given = [
            (holder, item["entry"], what_left(item), text(item["at"]), item["lease"] or "in an emergency")
            for holder, item in releases
        ]
        proofs = "".join(
            f"<p>Entry {item['entry']}, leaf hash <code>{escape(item['leaf'])}</code>:</p>"
            f"<pre><code>{escape(item['proof'])}</code></pre>"
            for _, item in releases
        )
        shown += "<h2>What the log says they were given</h2>"
        shown += _table(("Holder", "Entry", "Action", "When", "Lease"), given, numbers=(1,))
        shown += "<details><summary>Proofs that these entries are in the log (C2SP tlog-proof)</summary>"
        shown += f"{proofs}</details>"
    if missing:
        shown += f"<p class=named>The log has no release for {escape(', '.join(missing))}: it left past the log.</p>"
    return shown


def _plot(found: dict[str, Any]) -> str:
    """All scores, as the negative logarithm of their bound, with the threshold."""
    scores = found["scores"]
    if not scores:
        return ""
    limit = -found["threshold_log10_p"]
    best = max(-min(each["log10_p"], each["stamp_log10_p"]) for each in scores)
    top = min(_HIGHEST, max(2 * limit, best))
    plotted = sorted(scores, key=lambda each: min(each["log10_p"], each["stamp_log10_p"]))[:_PLOTTED]
    step = (_WIDTH - _LEFT - 20) / max(1, len(plotted))

    def height(value: float) -> float:
        # By the root: what is far beyond the threshold must not press everybody else into one line.
        return _HEIGHT - _BOTTOM - math.sqrt(min(1.0, max(0.0, value) / top)) * (_HEIGHT - _BOTTOM - 20)

    dots = []
    for at, each in enumerate(plotted):
        x = _LEFT + (at + 0.5) * step
        mark = ' stroke="var(--bad)" stroke-width="2"' if each["holder"] else ""
        for name, colour in (("log10_p", "--dot"), ("stamp_log10_p", "--dot2")):
            y = height(-each[name])
            label = escape(f"{each['holder'] or 'somebody else'}: {_power(-each[name])}")
            dots.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var({colour})"{mark}><title>{label}</title></circle>'
            )
    least = " and less" if best > top else ""
    levels = ((top, f"{_power(top)}{least}"), (limit, _power(limit)), (0.0, "1"))
    ticks = [_note(_LEFT - 8, height(value) + 4, said) for value, said in levels]
    shown = f"the {_PLOTTED:,} best of {number(len(scores))} candidates" if len(scores) > _PLOTTED else "all candidates"
    ticks.append(_note(_WIDTH - 20, _HEIGHT - 12, f"{shown}, the best on the left"))
    ticks.append(_note(_WIDTH - 20, height(limit) - 6, "above this line somebody is named"))
    who = "Dots with a red rim are those of who is named; others" if found["accused"] else "They"
    return (
        "<h2>All candidates</h2><p class=soft>How likely it is, at most, that an innocent scores as high as each "
        "candidate: by code word (<span class=word>●</span>) and by stamp (<span class=stamp>●</span>), each the bound "
        f"of that score alone, before it is multiplied by all that was tried. {who} have no names here, and rounded "
        "scores.</p>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Scores of all candidates">'
        f"{_level(height(limit), 'var(--bad)')}{_level(_HEIGHT - _BOTTOM, 'var(--line)')}"
        f"{''.join(ticks)}{''.join(dots)}</svg>"
    )


def _power(value: float) -> str:
    """A bound as people write it: 10 to the minus `value`."""
    raised = f"{max(0.0, value):.0f}"
    return "1" if raised == "0" else f"10⁻{raised.translate(_RAISED)}"


def _note(x: float, y: float, said: str) -> str:
    """Some words in the plot that end at x."""
    return f'<text x="{x}" y="{y:.1f}" text-anchor="end" font-size="12" class="soft">{escape(said)}</text>'


def _level(y: float, stroke: str) -> str:
    """A line across the plot."""
    return f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="{stroke}" stroke-dasharray="6 4"/>'


def _transformed(found: dict[str, Any]) -> str:
    from strongroom.cli.trace import what_was_left

    if not found["transformations"]:
        nothing = "Nothing: what only changes numbers, as rounding and pruning do, need not be."
        return f"<h2>What had to be undone</h2><p>{nothing}</p>"
    items = "".join(f"<li>{escape(each)}</li>" for each in found["transformations"])
    left = what_was_left(found)
    said = f"<p>{escape(left[:1].upper() + left[1:])}.</p>" if left else ""
    return f"<h2>What had to be undone</h2><ul>{items}</ul>{said}"


def _wrong(found: dict[str, Any]) -> str:
    points = [
        "Whoever has the version's mark root can make a copy in somebody else's name. That is the custodian's: the log "
        "has every use of it that went through it.",
        "The chance is for a file that was not made with the help of earlier reports. Who asked for many traces of one "
        "version is in the log.",
        *(
            [
                "The holder named is whose keys or copy the weights came out of. That is not always who leaked them: "
                "keys and files can be stolen."
            ]
            if found["verdict"] == "named"
            else []
        ),
        f"The chance is for the whole trace: {number(found['candidates'])} candidates (everybody whom the room has "
        f"ever known, whether or not they had these weights), {found['ways']} ways of "
        "scoring, every version that was compared, both layers. It holds whatever was done to the file, as long as "
        "AES-256 is not told from chance.",
    ]
    if found["text"]:
        points.append(
            "A text says which copy was asked, not who runs it: keep how, where and when it was obtained. Whoever put "
            "together the text could have had it written by another copy."
        )
    if found["verdict"] != "named":
        points.append("That nobody is named clears nobody: a mark can be worn away, and a distilled model has none.")
    return "<h2>What would make this wrong</h2><ul>" + "".join(f"<li>{escape(each)}</li>" for each in points) + "</ul>"


def _preserve(found: dict[str, Any]) -> str:
    rows = [(each["path"], size(each["bytes"]), each["sha256"]) for each in found["suspect"]["files"]]
    return (
        "<h2>Keeping the evidence</h2><ul>"
        "<li>Keep the file unchanged, with its SHA-256 below, which is also in the log; work on a copy of it.</li>"
        "<li>Note where it was found, when, and by whom.</li>"
        "<li>Keep this page as it is. Its own SHA-256, noted elsewhere, shows that nobody changed it.</li>"
        "<li>Have a witness sign the newest checkpoint (<code>strongroom log cosign</code>), and export the log "
        "(<code>strongroom log export</code>).</li>"
        "<li>Keep the version in the room. Then the trace can be repeated by anybody with the same right, and has the "
        "same outcome.</li></ul>" + _table(("File", "Size", "SHA-256"), rows)
    )


def _tensors(tensors: Sequence[dict[str, Any]]) -> str:
    if not tensors:
        return ""
    rows = [
        (each["name"], each["partner"] or "missing", f"{each['cosine']:.4f}", ", ".join(each["transformations"]))
        for each in tensors[:_TENSORS]
    ]
    left = f"<p class=soft>{len(tensors) - _TENSORS} more.</p>" if len(tensors) > _TENSORS else ""
    return (
        "<h2>Tensor by tensor</h2><details><summary>Which of its tensors is which of ours</summary>"
        + _table(("Ours", "Theirs", "Cosine", "Found"), rows, numbers=(2,))
        + left
        + "</details>"
    )


def _fits(version: dict[str, Any]) -> str:
    if not version["fits"]:
        return "not looked for: others are more alike"
    return "its marks are in it" if version["marked"] else "none of its marks"


def _versions(versions: Sequence[dict[str, Any]]) -> str:
    if not versions:
        return ""
    rows = [(each["ref"], f"{each['likeness']:.4f}", f"{each['part']:.4f}", _fits(each)) for each in versions]
    header = ("Version", "Likeness of what is there", "Of the whole", "Marks")
    return "<h2>Versions compared</h2>" + _table(header, rows, numbers=(1, 2))


def what_left(release: dict[str, Any]) -> str:
    """``load``, ``copy``, ``copy as int4``."""
    return f"{release['action']} as {release['form']}" if "form" in release else str(release["action"])
