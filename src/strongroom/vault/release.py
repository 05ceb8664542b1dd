"""Release: the key bundle of one holder for one version (spec/container.md, sections 7 and 11)."""

from __future__ import annotations

from strongroom.crypto.segments import VersionKeys
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.manifest import Manifest
from strongroom.marking.code import Code
from strongroom.vault.record import VersionRecord


def bundle_for(record: VersionRecord, manifest: Manifest, signer: bytes, holder: str) -> KeyBundle:
    """The common key and, at each position, the key of the variant that `holder`'s code word names.

    No pass over the weights: the release is the fingerprint.
    """
    keys = VersionKeys.of(record.version_key, manifest.positions)
    word = Code(record.code_key, manifest.positions, record.colluders).word(holder)
    return KeyBundle(
        suite=manifest.suite,
        room=manifest.room,
        version=manifest.version,
        revision=manifest.revision,
        manifest_digest=manifest.digest(),
        signer=signer,
        holder=holder,
        ref=f"{record.name}@{record.number}",
        common_key=keys.common,
        word=word,
        variant_keys=keys.chosen(word),
    )
