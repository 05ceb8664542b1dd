"""Release: the key bundle of one holder for one version (spec/container.md, sections 7 and 11), and what its requester
is answered with (spec/release.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

from strongroom.crypto.segments import VersionKeys
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.manifest import Manifest
from strongroom.marking.code import Code
from strongroom.vault.record import VersionRecord


@dataclass(frozen=True)
class Answer:
    """What a release hands out; `sealed` opens for the requester only. Sizes: `proof` hashes of 32 bytes."""

    entry: bytes
    index: int
    proof: tuple[bytes, ...]
    checkpoint: bytes
    sealed: bytes = field(repr=False)
    store: str


class Bundles:
    """The key bundles of one version. What is the same for all holders is made once; all of it is secret."""

    def __init__(self, record: VersionRecord, manifest: Manifest, signer: bytes) -> None:
        self.record, self._manifest, self._signer = record, manifest, signer
        self._keys = VersionKeys.of(record.version_key, manifest.positions)
        self._code = Code(record.code_key, manifest.positions, record.colluders)
        self._digest = manifest.digest()

    def of(self, holder: str) -> KeyBundle:
        """The common key and, at each position, the key of the variant that `holder`'s code word names.

        No pass over the weights: the release is the fingerprint.
        """
        word = self._code.word(holder)
        return KeyBundle(
            suite=self._manifest.suite,
            room=self._manifest.room,
            version=self._manifest.version,
            revision=self._manifest.revision,
            manifest_digest=self._digest,
            signer=self._signer,
            holder=holder,
            ref=f"{self.record.name}@{self.record.number}",
            common_key=self._keys.common,
            word=word,
            variant_keys=self._keys.chosen(word),
        )
