"""One revision of one version in the store: fetched, verified and opened segment by segment.

The steps are those of spec/container.md, section 12. Nothing here decides who may read: whoever constructs a
`SealedImage` brings
the keys.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.core.limits import LIMITS
from strongroom.crypto.keys import check_commitment
from strongroom.crypto.sealing import unseal
from strongroom.crypto.segments import COMMON as KIND_COMMON
from strongroom.crypto.segments import VARIANT_A, SegmentCipher, pack_key
from strongroom.crypto.signatures import key_id, verify
from strongroom.errors import (
    CannotVerify,
    IntegrityError,
    LimitExceeded,
    NotFound,
    Rollback,
    Tampered,
    Truncated,
)
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.index import Index
from strongroom.formats.manifest import COMMON, MARKED, PAYLOAD_TYPE, TAG_BYTES, Manifest, PackEntry
from strongroom.formats.pack import Trailer, trailer_bytes
from strongroom.storage.blobs import Blobs

_BATCH_BYTES = 1 << 20


def read_manifest(blobs: Blobs, room: bytes, version: bytes, revision: int, signer: bytes, digest: bytes) -> Manifest:
    """Steps 2 and 3: the manifest of a revision, signed by `signer`, and with the remembered SHA-256 `digest`."""
    name = f"versions/{version.hex()}/{revision}.manifest"
    data = _read_small(blobs, name, LIMITS.manifest, "manifest")
    with _naming(name):
        envelope = Envelope.decode(data, payload_type=PAYLOAD_TYPE)
        _check_signature(envelope, signer)
        manifest = Manifest.decode(envelope.payload)
    if manifest.room != room or manifest.version != version:
        raise Tampered("manifest.swapped", f"the manifest {name} is that of another version or another room")
    if manifest.revision == revision and hmac.compare_digest(manifest.digest(), digest):
        return manifest
    if manifest.revision < revision:
        raise Rollback(
            "manifest.rollback",
            f"the manifest {name} is properly signed but is not the newest: revision {manifest.revision}, "
            f"expected revision {revision} as recorded",
            hint="the store was set back to an older state; restore it, then run strongroom verify",
        )
    raise Tampered(
        "manifest.other",
        f"the manifest {name} is properly signed, but is another one than the custodian and the key bundles remember",
        hint="restore the manifest from a copy of the store",
    )


def _check_signature(envelope: Envelope, signer: bytes) -> None:
    signed = pre_authentication_encoding(envelope.payload_type, envelope.payload)
    for name, signature in envelope.signatures:
        # The key's name is not signed. It must fit all the same, so that no bit of what the room wrote may change.
        if name == key_id(signer):
            with contextlib.suppress(IntegrityError):
                verify(signer, signature, signed)
                return
    raise Tampered(
        "manifest.signature",
        "the manifest is not signed by this room's key",
        hint="restore the manifest from a copy of the store; it was altered, or belongs to another room",
    )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors about the bytes of an object say which object it is."""
    try:
        yield
    except (IntegrityError, CannotVerify) as error:
        evidence = {"object": name, **error.evidence}
        raise type(error)(error.code, f"{name}: {error.message}", hint=error.hint, **evidence) from None


_CODES = {
    "manifest": ("manifest.missing", "manifest.tampered"),
    "index": ("index.missing", "index.tampered"),
}


def _read_small(blobs: Blobs, name: str, limit: int, what: str) -> bytes:
    missing, tampered = _CODES[what]
    try:
        return blobs.read(name, limit=limit)
    except NotFound as error:
        raise Truncated(
            missing,
            f"the store has no {what} {name}",
            hint="if it was rotated meanwhile, load it again; else strongroom fsck, and restore it from a copy",
            object=name,
        ) from error
    except LimitExceeded as error:
        # Not too much asked for: nothing of ours is that large, so somebody else wrote it.
        raise Tampered(
            tampered,
            f"the {what} {name} is larger than it can be: {error.message}",
            hint="restore the object from a copy of the store",
            object=name,
        ) from None


class SealedImage:
    """Verified access to the segments of one revision. Thread-safe. On a failure the caller wipes the destination."""

    def __init__(self, blobs: Blobs, manifest: Manifest, common_key: bytes) -> None:
        self.blobs = blobs
        self.manifest = manifest
        self.index = self._read_index(common_key)
        self.layout = self.index.layout
        self._check_layout()
        self._common_key = common_key
        self.cipher = SegmentCipher(
            manifest.suite, manifest.version, manifest.revision, self.layout.digest(manifest.suite)
        )
        self._trailers: dict[bytes, Trailer] = {}
        self._aeads: dict[bytes, AESGCM] = {}
        self._firsts = {
            COMMON: [pack.first for pack in manifest.common_packs],
            MARKED: [pack.first for pack in manifest.marked_packs],
        }
        self._lock = threading.Lock()
        self._sealed_marked = self.layout.marked + TAG_BYTES
        self._batch = max(1, _BATCH_BYTES // (2 * self._sealed_marked))  # positions fetched in one read

    @classmethod
    def open(cls, blobs: Blobs, bundle: KeyBundle) -> SealedImage:
        """Steps 2 to 4 for a holder."""
        manifest = read_manifest(
            blobs, bundle.room, bundle.version, bundle.revision, bundle.signer, bundle.manifest_digest
        )
        if manifest.suite != bundle.suite or manifest.positions != bundle.positions:
            raise Tampered("bundle.wrong", "the key bundle and the manifest disagree on suite or positions")
        return cls(blobs, manifest, bundle.common_key)

    # -- index ---------------------------------------------------------------------------------------------------

    def _read_index(self, common_key: bytes) -> Index:
        manifest = self.manifest
        box = _read_small(self.blobs, manifest.index_name, manifest.index_bytes, "index")
        if len(box) < manifest.index_bytes:
            raise Truncated(
                "index.truncated",
                f"the index {manifest.index_name} has {len(box)} bytes, expected {manifest.index_bytes}",
                hint="strongroom fsck; restore the object from a copy of the store",
                object=manifest.index_name,
            )
        if manifest.suite.digest(box) != manifest.index_digest:
            raise Tampered("index.tampered", f"the index {manifest.index_name} is not the one that the manifest pins")
        with _naming(manifest.index_name):
            return Index.decode(unseal(common_key, box, Index.context(manifest.version, manifest.revision)))

    def _check_layout(self) -> None:
        layout, manifest = self.layout, self.manifest
        said = (layout.common_bytes, layout.common, layout.positions, layout.marked)
        signed = (manifest.common_bytes, manifest.common_segment, manifest.positions, manifest.marked_segment)
        if said != signed or len(layout.stripes) != manifest.common_count:
            raise Tampered("layout.mismatch", "the index and the manifest disagree on the segments")

    # -- packs ---------------------------------------------------------------------------------------------------

    def pack_of(self, kind: int, number: int) -> PackEntry:
        packs = self.manifest.marked_packs if kind == MARKED else self.manifest.common_packs
        return packs[bisect_right(self._firsts[kind], number) - 1]

    def trailer(self, pack: PackEntry) -> Trailer:
        """Step 5: the verified trailer of a pack, fetched once."""
        trailer = self._trailers.get(pack.id)
        if trailer is None:
            trailer = read_trailer(self.blobs, self.manifest, pack)
            with self._lock:
                self._trailers[pack.id] = trailer
        return trailer

    def _common_aead(self, pack: PackEntry) -> AESGCM:
        aead = self._aeads.get(pack.id)
        if aead is None:
            key = pack_key(self._common_key, pack.id)
            check_commitment(key, self.trailer(pack).commit, pack.name)
            aead = AESGCM(key)
            with self._lock:
                self._aeads[pack.id] = aead
        return aead

    # -- segments ------------------------------------------------------------------------------------------------

    def scratch(self) -> memoryview:
        """Private memory, for one thread, that holds any one common segment or a batch of marked ones, sealed."""
        return memoryview(bytearray(max(self.layout.common + TAG_BYTES, 2 * self._batch * self._sealed_marked)))

    def read_common(self, index: int, out: memoryview, scratch: memoryview) -> None:
        """Step 6 for common segment `index`, into `out` (exactly its size)."""
        pack = self.pack_of(COMMON, index)
        aead, trailer = self._common_aead(pack), self.trailer(pack)
        sealed = scratch[: len(out) + TAG_BYTES]
        self._fetch(pack, (index - pack.first) * (self.layout.common + TAG_BYTES), sealed)
        nonce = index.to_bytes(12, "little")
        self.cipher.open_into(aead, nonce, KIND_COMMON, index, sealed, trailer.digest_of(index), out)

    def read_marked(self, position: int, variant: int, key: bytes, out: memoryview, scratch: memoryview) -> None:
        """Step 6 for one variant of marked segment `position`."""
        pack = self.pack_of(MARKED, position)
        sealed = scratch[: self._sealed_marked]
        self._fetch(pack, (2 * (position - pack.first) + variant) * self._sealed_marked, sealed)
        digest, commit = self.trailer(pack).marked_record(position, variant)
        check_commitment(key, commit, position)
        self.cipher.open_into(AESGCM(key), pack.id[:12], VARIANT_A + variant, position, sealed, digest, out)

    def read_stripe(self, first: int, wanted: Sequence[tuple[KeyBundle, memoryview]], scratch: memoryview) -> None:
        """Step 6 for the marked segments from position `first` that fill each memory of `wanted`, all of one size, as
        the bundle beside it opens them.

        Both variants of neighbouring positions are fetched in one read: on a disk that costs less than many small ones,
        on an object store far less.
        """
        size, sealed_size = self.layout.marked, self._sealed_marked
        position, end = first, first + len(wanted[0][1]) // size
        while position < end:
            pack = self.pack_of(MARKED, position)
            trailer, count = self.trailer(pack), min(end, pack.end, position + self._batch) - position
            sealed = scratch[: 2 * count * sealed_size]
            self._fetch(pack, 2 * (position - pack.first) * sealed_size, sealed)
            records = trailer.marked_records(position, count)
            for bundle, out in wanted:
                self.cipher.open_variants(
                    position,
                    [bundle.variant(k) for k in range(position, position + count)],
                    [bundle.variant_key(k) for k in range(position, position + count)],
                    records,
                    pack.id[:12],
                    sealed,
                    out[(position - first) * size : (position - first + count) * size],
                )
            position += count

    def _fetch(self, pack: PackEntry, offset: int, sealed: memoryview) -> None:
        try:
            self.blobs.read_into(pack.name, offset, sealed)
        except NotFound as error:
            raise missing_pack(pack) from error


def read_trailer(blobs: Blobs, manifest: Manifest, pack: PackEntry) -> Trailer:
    """Fetch and verify the trailer of a pack; Truncated when pack or bytes are missing."""
    data = bytearray(trailer_bytes(pack.kind, pack.count))
    if len(data) > LIMITS.pack_trailer:
        raise Tampered("pack.malformed", f"pack {pack.name} would have a trailer of {len(data)} bytes", pack=pack.name)
    try:
        blobs.read_into(pack.name, manifest.body_bytes(pack), memoryview(data))
    except NotFound as error:
        raise missing_pack(pack) from error
    return Trailer.verify(bytes(data), manifest, pack)


def missing_pack(pack: PackEntry) -> Truncated:
    """The error for a pack that the store does not have."""
    return Truncated(
        "pack.missing",
        f"the store has no pack {pack.name}",
        hint="if it was rotated meanwhile, load it again; else strongroom fsck, and restore it from a copy",
        pack=pack.name,
    )


def sealed_segments(manifest: Manifest, pack: PackEntry) -> Iterator[tuple[int, int, int, int]]:
    """(number, variant, offset, bytes) of each sealed segment in the body of a pack, in order."""
    size = (manifest.marked_segment if pack.kind == MARKED else manifest.common_segment) + TAG_BYTES
    variants = 2 if pack.kind == MARKED else 1
    end = manifest.body_bytes(pack)
    for k in range(pack.count):
        for variant in range(variants):
            offset = (k * variants + variant) * size
            yield pack.first + k, variant, offset, min(size, end - offset)
