"""Witnesses (C2SP tlog-witness): somebody else, who signs only what extends what they have signed before, so that a log
can't show one history to one reader and another to the next."""

from __future__ import annotations

import hashlib
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from strongroom.core.files import locked, write_whole
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import BackendError, Conflict, Denied, NotFound, Tampered, UsageError
from strongroom.formats.checkpoint import Checkpoint, cosignature, cosignature_message, verify_cosignature
from strongroom.formats.merkle import verify_consistency
from strongroom.formats.note import COSIGNATURE, Note, Signature, VerifierKey, verify_note
from strongroom.formats.witness import AddCheckpoint

_TIMEOUT = 10.0  # seconds for one answer, all of it
_WAIT = 20.0  # seconds for what we ask of it before it signs
_MOST = 64 * 1024
_TURNS = 20  # checkpoints of others that a witness may sign between what it says of itself and our next request


class Witness:
    """A witness named `name`, of the logs of `keys` (by origin). What it has cosigned is kept in `folder`.

    Any number of processes may be the same witness on one folder: they take turns at each log.
    """

    def __init__(
        self, name: str, signer: Signer, folder: Path, keys: Mapping[str, VerifierKey], clock: Callable[[], int]
    ) -> None:
        self.key = VerifierKey(name, COSIGNATURE, signer.public_key)
        self._signer, self._folder, self._keys, self._clock = signer, folder, dict(keys), clock

    def add_checkpoint(self, request: bytes) -> bytes:
        """The cosignature line for a request, once it is recorded.

        The checks are in the order of the specification:

        NotFound ``witness.unknown_log`` (404), Denied ``witness.unsigned`` (403), Tampered ``witness.malformed`` (400),
        Conflict ``witness.size`` with the size last cosigned in its evidence (409), Tampered ``log.consistency`` (422).
        """
        asked = AddCheckpoint.decode(request)
        note = Note.decode(asked.note)
        checkpoint = Checkpoint.decode(note.text)
        key = self._keys.get(checkpoint.origin)
        if key is None:
            raise NotFound("witness.unknown_log", f"this is no witness of the log {checkpoint.origin!r:.80}")
        try:
            signed = key.name in verify_note(note, [key], signatures.verify)
        except Tampered:
            signed = False
        if not signed:
            raise Denied("witness.unsigned", f"the checkpoint is not signed by the key of {checkpoint.origin}")
        if asked.old > checkpoint.size:
            raise Tampered("witness.malformed", "the old size is beyond the checkpoint's")
        # Looking and recording have to be one step: a slower, older request must not roll the record back.
        with self._record(checkpoint.origin) as record:
            seen = record.read()
            size = seen.size if seen is not None else 0
            if asked.old != size:
                raise Conflict("witness.size", f"{size} entries were cosigned last, not {asked.old}", size=size)
            if seen is not None and seen.size == checkpoint.size and seen.root != checkpoint.root:
                raise Conflict("witness.size", "another tree of this size was cosigned before", size=size)
            if seen is not None:
                verify_consistency(seen.size, seen.root, checkpoint.size, checkpoint.root, list(asked.proof))
            elif asked.proof:
                raise Tampered("log.consistency", "a proof from the empty log is empty")
            record.write(checkpoint)
        now = self._clock()
        value = self._signer.sign(cosignature_message(note.text, now))
        return cosignature(self.key, now, value).encode().encode()

    @contextmanager
    def _record(self, origin: str) -> Iterator[_Record]:
        name = hashlib.sha256(origin.encode()).hexdigest()
        with ExitStack() as stack:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(locked(self._folder / f"{name}.lock"))
            except OSError as error:
                raise BackendError("witness.folder", f"can't write to {self._folder}: {error.strerror}") from None
            yield _Record(self._folder / name)


@dataclass(frozen=True)
class _Record:
    path: Path

    def read(self) -> Checkpoint | None:
        try:
            return Checkpoint.decode(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise BackendError("witness.record", f"can't read {self.path}: {error}") from None

    def write(self, checkpoint: Checkpoint) -> None:
        """Durable before anything is signed: a witness that forgets can be made to sign a fork."""
        try:
            write_whole(self.path, checkpoint.encode().encode())
        except OSError as error:
            raise BackendError("witness.record", f"can't write {self.path}: {error.strerror}") from None


def cosign(
    url: str,
    witness: VerifierKey,
    note: bytes,
    consistency: Callable[[int, int], list[bytes]],
    *,
    post: Callable[[str, bytes], tuple[int, bytes]] | None = None,
) -> bytes:
    """`note` with the cosignature of the witness at `url`: the log's side of ``add-checkpoint``.

    `consistency` gives the proof between two sizes. Conflict ``witness.ahead`` for a witness that has seen more, or
    another tree, than this log has (`seen` and `size` in its evidence): a fork, or a log that was set back, unless it
    has grown as far since. BackendError ``witness.unreachable``, ``witness.busy``.
    """
    if not re.match(r"https?://", url):
        raise UsageError("witness.url", f"{url!r:.80} is not the address of a witness", hint="https://HOST/PREFIX")
    size = Checkpoint.decode(Note.decode(note).text).size
    send, old, until = post or _post, 0, time.monotonic() + _WAIT
    for _ in range(_TURNS):  # the first answer says where the witness is; those who ask at the same time move it on
        proof = tuple(consistency(old, size)) if old else ()
        status, answer = send(f"{url.rstrip('/')}/add-checkpoint", AddCheckpoint(old, proof, note).encode())
        if status == 200:
            return _joined(note, witness, answer)
        seen = answer.decode("ascii", "replace").strip()
        if status != 409 or not re.fullmatch(r"[0-9]{1,18}", seen, re.ASCII):
            raise BackendError("witness.refused", f"the witness {witness.name} answers {status}", status=status)
        if int(seen) > size or int(seen) == old:
            raise Conflict(
                "witness.ahead",
                f"the witness {witness.name} has seen {seen} entries of this log, which has {size}",
                hint="strongroom log verify: the log was set back, or there are two of it",
                seen=int(seen),
                size=size,
            )
        old = int(seen)
        if time.monotonic() > until:
            break
    raise busy(url, witness)


def busy(url: str, witness: VerifierKey) -> BackendError:
    """The error for a witness that signs for others, each time that it is asked."""
    return BackendError(
        "witness.busy",
        f"the witness {witness.name} has signed another checkpoint of this log each time that it was asked, and this "
        "one is not cosigned: others have theirs signed at the same time",
        hint=f"try again: strongroom log cosign --url {url} --witness {witness.encode()}",
    )


def _joined(note: bytes, witness: VerifierKey, answer: bytes) -> bytes:
    parsed = Note.decode(note)
    lines = answer.decode("utf-8", "replace").splitlines()
    for signature in map(Signature.decode, lines):
        if (signature.name, signature.key_id) != (witness.name, witness.key_id):
            continue  # of a key that nobody asked for
        joined = Note(parsed.text, (*parsed.signatures, signature))
        if verify_cosignature(joined, witness, signatures.verify) is not None:
            return joined.encode()
    raise Tampered("witness.no_signature", f"the answer of {witness.name} has no cosignature of its own")


def _post(url: str, body: bytes) -> tuple[int, bytes]:
    """In a thread, which is not waited for: a witness that drips its answer holds nobody up."""
    answers: queue.SimpleQueue[tuple[int, bytes] | BackendError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_posted(url, body))
        except BackendError as error:
            answers.put(error)
        except Exception as error:  # noqa: BLE001 - of whatever a server can make of HTTP
            answers.put(_unreachable(url, type(error).__name__))

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=_TIMEOUT)
    except queue.Empty:
        raise _unreachable(url, f"no whole answer within {_TIMEOUT:g} seconds") from None
    if isinstance(found, BackendError):
        raise found
    return found


def _posted(url: str, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=body, method="POST")  # noqa: S310 - http or https: `cosign` sees to it
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
            return int(answer.status), answer.read(_MOST)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_MOST)
    except OSError as error:
        why = getattr(error, "reason", None) or error
        why = getattr(why, "strerror", None) or why
        raise _unreachable(url, why) from None


def _unreachable(url: str, why: object) -> BackendError:
    return BackendError(
        "witness.unreachable",
        f"the witness at {url} does not answer: {why}",
        hint="see that strongroom witness runs there, then try again",
    )
