"""Whose copy a found file is (spec/mark.md, sections 8 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from strongroom.core.progress import Progress
from strongroom.errors import NotFound
from strongroom.formats.entry import Entry
from strongroom.marking.code import Code
from strongroom.marking.decode import Decoding, marked_bound
from strongroom.marking.matched import MatchedFilter, bound
from strongroom.marking.stamp import Stamp
from strongroom.vault.comparison import Comparison
from strongroom.vault.effort import STOPPED, Patience, Purse
from strongroom.vault.opened import opened
from strongroom.vault.originals import Originals
from strongroom.vault.suspect import Suspect
from strongroom.vault.unmerging import is_adapter, unmerged

if TYPE_CHECKING:
    from strongroom.vault.record import VersionRecord
    from strongroom.vault.texttrace import Echo
    from strongroom.vault.vault import Vault

_Compared = tuple["VersionRecord", Originals, Comparison]
FALSE_ACCUSATION = 1e-9  # over all candidates, versions and ways of scoring together
_UNRELATED = 0.05
_CLOSE = 0.01
_PART = 0.9
_EXPLAINED = 0.9  # of the suspect's elements
_BASES = 4  # versions that an adapter may have been merged into, those most like the suspect
_LAYERS = 2
_LOOKS = 2  # at the marked share, and at everything
_PASSES = 6
_PASSED_ON = 4096
_LITTLE = 1 << 20  # bytes in marked segments: fewer are too few to screen by
_FEW = 32  # whose stamps are scored in full
_UNUSUAL = 20  # times as many innocents as there are, of whom the best would be about as high


@dataclass
class Candidate:
    """Somebody who could have been given these weights, with what speaks for it."""

    holder: str
    person: str
    sigma: float = 0.0
    log10_p: float = 0.0
    decoder: str = ""
    z: float = 0.0
    stamp_log10_p: float = 0.0
    false_accusation: float = 1.0
    releases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.log10_p, self.stamp_log10_p)


@dataclass
class Trace:
    """The outcome of one trace; `as_json` is the report."""

    suspect: dict[str, Any]
    verdict: str = "unrelated"
    weights: str = ""
    likeness: float = 0.0
    accused: list[Candidate] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    threshold: float = 0.0  # log10 of the bound that a candidate has to be under
    false_accusation_bound: float = FALSE_ACCUSATION
    marked: bool = False
    marked_log10_p: float = 0.0
    positions: int = 0
    positions_used: int = 0
    elements: int = 0
    ways: int = 0
    withheld: bool = False  # whether nobody was looked for
    carries_marks: bool = False  # whether anything that leaves of the version has a mark
    versions: list[dict[str, Any]] = field(default_factory=list)
    transformations: list[str] = field(default_factory=list)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    text: dict[str, Any] | None = None  # figures of text, where that is what was found

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "weights": self.weights,
            "accused": [_accused(each) for each in self.accused],
            "false_accusation_bound": self.false_accusation_bound,
            "carries_marks": self.carries_marks,
            "marked": self.marked,
            "marked_log10_p": round(self.marked_log10_p, 1),
            "likeness": round(self.likeness, 6),
            "positions": self.positions,
            "positions_used": self.positions_used,
            "elements": self.elements,
            "candidates": len(self.candidates),
            "threshold_log10_p": round(self.threshold, 2),
            "ways": self.ways,
            "transformations": self.transformations,
            "versions": self.versions,
            "scores": self._scores(),
            "tensors": self.tensors,
            "suspect": self.suspect,
            "text": self.text,
        }

    def _scores(self) -> list[dict[str, Any]]:
        """All scores, for the picture. Those of whom nobody accuses have no names, are rounded, and stand in an order
        of their own for each layer: by exact scores a file could be changed, step by step, until it names whom one
        likes."""
        named = [
            {"holder": each.holder, "log10_p": round(each.log10_p, 2), "stamp_log10_p": round(each.stamp_log10_p, 2)}
            for each in self.accused
        ]
        rest = [each for each in self.candidates if each not in self.accused]
        words = sorted(float(math.ceil(each.log10_p)) for each in rest)
        stamps = sorted(float(math.ceil(each.stamp_log10_p)) for each in rest)
        return named + [
            {"holder": "", "log10_p": word, "stamp_log10_p": stamp} for word, stamp in zip(words, stamps, strict=True)
        ]


def _accused(each: Candidate) -> dict[str, Any]:
    return {
        "holder": each.holder,
        "person": each.person,
        "score_sigma": round(max(each.sigma, each.z), 2),
        "log10_p": round(each.best, 1),
        "layer1": {"sigma": round(each.sigma, 2), "log10_p": round(each.log10_p, 1), "decoder": each.decoder},
        "layer2": {"z": round(each.z, 2), "log10_p": round(each.stamp_log10_p, 1)},
        "false_accusation": each.false_accusation,
        "releases": each.releases,
    }


def trace(
    vault: Vault,
    suspect: Suspect,
    name: str,
    files: list[dict[str, Any]],
    *,
    weights: str | None,
    progress: Progress,
    named: Callable[[str], bool] = lambda _: True,
    seconds: float | None = None,
) -> Trace:
    """Compare a suspect with every version of `weights`, or of the whole room, and name whose copy it is if that can be
    said with a false accusation bounded by `FALSE_ACCUSATION`. `name` and `files` are what the report calls it. Nobody
    is looked for in a version that is not to be `named` about: what nobody is told is not found out, so that nothing
    else depends on it. `seconds`: how long alignment may take; half of it is for what lies as it did.

    NotFound ``weights.missing``; UsageError ``suspect.*``, ``source.*``; what reading the room raises.
    """
    described = {"name": name, "tensors": len(suspect.tensors), "bytes": suspect.bytes, "files": files}
    result = Trace(described)
    compared = []
    patience, records = Patience(seconds), _records(vault, weights)
    for left, record, originals in _opened(vault, records, weights):
        compared.append((record, originals, Comparison(originals, suspect, until=patience.until(left + len(records)))))
    if not compared:
        raise _none()
    compared = [_unmerged(vault, suspect, each, compared) for each in compared]
    # Most leaks lie as they did. If one version explains this one, the others need no long look.
    most = max(each.explained for _, _, each in compared)
    looked_for = [each for _, _, each in compared if most < _EXPLAINED or each.explained >= most - (1 - _EXPLAINED)]
    purse = Purse(sum(each.info.elements for each in suspect.tensors.values()), len(looked_for))
    deepened = sorted(looked_for, key=lambda each: -each.explained)
    for left, each in zip(range(len(deepened), 0, -1), deepened, strict=True):
        each.deepen(progress, purse, patience.until(left))
    compared.sort(key=lambda each: -each[2].common)
    most = compared[0][2].common
    result.versions = [
        {
            "ref": f"{record.name}@{record.number}",
            "likeness": round(each.common, 6),
            "part": round(each.likeness, 6),
            "fits": False,
            "marked": False,
        }
        for record, _, each in compared
    ]
    result.likeness = most
    if most < _UNRELATED:
        # Whoever reads that nothing is like it is told that not everything was looked for.
        result.transformations = [STOPPED] if any(each.stopped for each in looked_for) else []
        return result
    # Both by what is there and by how much of the version is there: a tensor of another version beside the leak must
    # not draw all attention to that one.
    whole = max(each[2].likeness for each in compared)
    close = [
        each
        for each in compared
        if each[2].common >= most - _CLOSE or each[2].likeness >= _PART * whole or (each[2].merged and each[2].common)
    ]
    found = [
        traced(
            vault,
            result,
            record,
            originals,
            comparison,
            versions=len(close),
            named=named(f"{record.name}@{record.number}"),
            progress=progress,
        )
        for record, originals, comparison in close
    ]
    for outcome in found:
        about = next(told for told in result.versions if told["ref"] == outcome.weights)
        # As of `marked` without a name, in which nothing depends on who is accused.
        about |= {"fits": True, "marked": outcome.marked_log10_p <= math.log10(FALSE_ACCUSATION)}
    return min(found, key=lambda each: (not each.accused, each.marked_log10_p, -each.likeness))


def _unmerged(vault: Vault, suspect: Suspect, adapter: _Compared, compared: Sequence[_Compared]) -> _Compared:
    """An adapter compared with what a suspect adds to other weights of the room, where that is like it; else as it
    was."""
    record, originals, comparison = adapter
    if comparison.likeness >= _UNRELATED or not is_adapter(originals):
        return adapter
    bases = [each for each in compared if each[0].version != record.version]
    if not bases:  # one version alone is looked for, and its weights may have been merged into any other
        bases = [
            (other, known, Comparison(known, suspect))
            for _, other, known in _opened(vault, _records(vault, None))
            if other.version != record.version
        ]
    bases = sorted((each for each in bases if each[2].likeness >= _UNRELATED), key=lambda each: -each[2].likeness)
    for base, _, into in bases[:_BASES]:
        if (found := unmerged(originals, into)) is not None:
            return record, originals, Comparison(originals, found, f"{base.name}@{base.number}")
    return adapter


def _records(vault: Vault, weights: str | None) -> list[VersionRecord]:
    """The secrets of one version, or of all that are not shredded."""
    if weights is not None:
        return [opened(vault, weights, lambda _, record: record)]
    found = []
    for info in vault.ls():
        try:
            if info.state != "shredded":
                found.append(opened(vault, info.ref, lambda _, record: record))
        except NotFound as error:
            if error.code != "weights.shredded":  # which it was meanwhile
                raise
    if not found:
        raise _none()
    return found


def _none() -> NotFound:
    return NotFound("weights.missing", "the room has no weights to compare with", hint="strongroom put PATH NAME")


def _opened(
    vault: Vault, records: Sequence[VersionRecord], weights: str | None = None
) -> Iterator[tuple[int, VersionRecord, Originals]]:
    """Each version as it is now, and how many are left with it: those before it took long, and it may have been rotated
    meanwhile, or shredded: then, unless these are the `weights` that were asked about, it is left out."""
    for left, known in zip(range(len(records), 0, -1), records, strict=True):
        ref = f"{known.name}@{known.number}"
        try:
            record, originals = opened(vault, ref, lambda _, now: (now, Originals(vault.image(now), now)))
        except NotFound as error:
            if weights is not None or error.code != "weights.shredded":
                raise
            continue
        yield left, record, originals


def traced(
    vault: Vault,
    blank: Trace,
    record: VersionRecord,
    originals: Originals,
    comparison: Comparison | Echo,
    *,
    versions: int,
    named: bool,
    progress: Progress,
) -> Trace:
    """The outcome for one version of `versions`, or of a text, of which the first look is at everything already."""
    result = Trace(
        suspect=blank.suspect,
        verdict="weights-only",
        weights=f"{record.name}@{record.number}",
        likeness=comparison.common,
        versions=blank.versions,
        withheld=not named,
        carries_marks=originals.carries_marks,
        transformations=_transformations(comparison),
        tensors=[each.as_json() for each in comparison.tensors],
    )
    if not result.carries_marks:
        return result
    people = result.candidates = candidates(vault)
    code = Code(record.code_key, originals.layout.positions, record.colluders)
    result.positions = code.positions
    gather = partial(comparison.gather, progress=progress)
    in_full = people if named and len(people) <= _FEW else []  # whose stamps are scored in full
    little = originals.layout.positions * originals.layout.marked < _LITTLE
    found = gather(_stamps(record, in_full), everything=little, screening=named and not in_full)
    estimates, matched = found.estimator.done(), found.matched
    result.marked_log10_p = marked_bound(estimates) + math.log10(versions)
    result.positions_used, result.elements = estimates.used, found.elements
    if named:
        decoding = Decoding(estimates, _words(code, people), code.biases / 65536, workers=vault.workers)
        if not in_full:
            # So many stamps are not all scored in full: those that a sample of the leak, or their code words, speak
            # for.
            likely = [score.candidate for score in sorted(decoding.scores(), key=lambda each: -each.sigma)]
            screened = matched.screened(_stamps(record, people), likely, _FEW)
            in_full = [people[k] for k in sorted({*likely[:_FEW], *screened})]
            kept = matched.among(_stamps(record, in_full))  # if all that was read was kept
            matched = kept or gather(_stamps(record, in_full), everything=little).matched
        _stamped(in_full, matched)
        _name(result, decoding, versions)
        # The marked share has said most of what there is. The rest is read where somebody may still be hidden in it.
        unusual = math.sqrt(2 * math.log(_UNUSUAL * len(people)))  # the best of so many innocents seldom reaches it
        if not (comparison.whole or little) and (
            not result.accused or any(each.z >= unusual for each in people if each not in result.accused)
        ):
            found = gather(_stamps(record, in_full), everything=True)
            result.elements = found.elements
            _stamped(in_full, found.matched)
            _name(result, decoding, versions)
    result.transformations = _transformations(comparison)  # with what the gathering has found
    result.tensors = [each.as_json() for each in comparison.tensors]
    result.marked = bool(result.accused) or result.marked_log10_p <= math.log10(FALSE_ACCUSATION)
    result.verdict = "named" if result.accused else "weights-only"
    _add_releases(vault, result.accused, result.weights)
    return result


def _stamps(record: VersionRecord, people: Sequence[Candidate]) -> list[Stamp]:
    key = record.stamp_key
    return [Stamp(key, each.holder) for each in people]


def _words(code: Code, people: Sequence[Candidate]) -> NDArray[np.uint8]:
    """uint8 (people, positions): the bits of each one's code word."""
    bits = np.empty((len(people), code.positions), np.uint8)
    for k, each in enumerate(people):
        bits[k] = code.bits(each.holder)
    return bits


def _stamped(people: Sequence[Candidate], matched: MatchedFilter) -> None:
    for each, z in zip(people, matched.scores(), strict=True):
        if (log10_p := bound(float(z))) <= each.stamp_log10_p:
            each.z, each.stamp_log10_p = float(z), log10_p


def candidates(vault: Vault) -> list[Candidate]:
    """Every principal that the room has ever had, and that can hold weights: whoever took them past the log has a code
    word all the same."""
    with vault.custodian.ledger.view() as state:
        found = [each for each in state.principals.values() if not each.path.startswith("team/")]
        return [Candidate(each.path, each.person) for each in sorted(found, key=lambda each: each.path)]


def _name(result: Trace, decoding: Decoding, versions: int) -> None:
    """Accuse, pass after pass, everybody whose bound times all that was tried is under `FALSE_ACCUSATION`."""
    people = result.candidates
    limit = math.log10(FALSE_ACCUSATION)
    named: list[int] = []
    among: list[int] | None = None
    for number in range(1, _PASSES + 1):
        scores = {score.candidate: score for score in decoding.scores(named, among)}
        # Who is nowhere near it alone will not be named by what is known of others: looking no further leaves people
        # out, and touches no bound.
        among = sorted(scores, key=lambda candidate: -scores[candidate].sigma)[:_PASSED_ON]
        ways = math.log10(len(decoding.decoders(len(named))))
        # Of the passes the first has half of what may go wrong, the next a quarter, and so on: they never add up to
        # more than all.
        tried = math.log10(versions * len(people) * _LAYERS * _LOOKS * 2**number)
        if number == 1:
            result.ways, result.threshold = len(decoding.decoders(0)), limit - tried - ways
        fresh = []
        for candidate, each in enumerate(people):
            if candidate in named:
                continue
            odds = each.stamp_log10_p + tried
            if (score := scores.get(candidate)) is not None:
                if number == 1 or score.log10_p < each.log10_p:
                    each.sigma, each.log10_p = score.sigma, score.log10_p
                    each.decoder = f"{score.decoder.colluders} by {score.decoder.model}"
                odds = min(odds, score.log10_p + tried + ways)
            if odds <= limit:
                each.false_accusation = 10.0 ** max(odds, -300)
                fresh.append(candidate)
        named += fresh
        if not fresh:
            break
    result.accused = sorted((people[k] for k in named), key=lambda each: each.best)


def _transformations(comparison: Comparison | Echo) -> list[str]:
    """What was found to be done to the weights, in words, with how many tensors it was found on."""
    counts: dict[str, int] = {}
    for each in comparison.tensors:
        for what in set(each.transformations) if each.partner else {"missing"}:
            counts[what] = counts.get(what, 0) + 1
    found = [f"{what} ({count} of {len(comparison.tensors)} tensors)" for what, count in sorted(counts.items())]
    return [*found, STOPPED] if comparison.stopped else found


def _add_releases(vault: Vault, accused: Sequence[Candidate], ref: str) -> None:
    """Which entries of the log gave these weights to those that are accused."""
    holders = {each.holder: each for each in accused}
    if not holders:
        return
    ledger = vault.custodian.ledger
    size = ledger.checkpoint()[0].size
    persons: dict[str, str] = {}
    for at in range(0, size, 1024):
        for index, data in enumerate(ledger.proven(at, min(at + 1024, size)), at):
            entry = Entry.decode(data)
            if entry.type == "principal":
                persons[entry.body["principal"]] = entry.body["person"]
            elif entry.type == "release" and entry.ref == ref and entry.body["holder"] in holders:
                each = holders[entry.body["holder"]]
                # Whose it was then: a path may have passed to somebody else since.
                each.person = persons.get(each.holder, each.person)
                found = {"entry": index, "action": entry.body["action"], "at": entry.at, "lease": entry.body["lease"]}
                found |= {name: entry.body[name] for name in ("form",) if name in entry.body}
                each.releases.append({**found, "person": each.person})
