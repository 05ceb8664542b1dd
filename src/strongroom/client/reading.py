"""A version as its holder reads it: released first, and once more if it is rotated before all of it is read
(spec/release.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from strongroom.client.receive import Received, receive
from strongroom.core.ids import Ref
from strongroom.errors import NotFound
from strongroom.formats.bundle import KeyBundle
from strongroom.storage.reader import ImageReader

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom, Say
    from strongroom.storage.blobs import Blobs


def reader(
    vault: AnyRoom,
    say: Say,
    holder: str,
    ref: str,
    break_glass: str | None = None,
    *,
    again: Callable[[str | None, KeyBundle], tuple[Blobs, KeyBundle] | None] | None = None,
) -> ImageReader:
    """A reader of `ref`, released to `holder`; errors as `receive`, and of the reader. `again`: in place of
    `released`. What was released in an emergency is not released again by itself: each emergency is somebody's word."""
    found, bundle = keys(vault, say, holder, ref, break_glass)
    asked = partial(again or partial(released, vault, say), found.lease) if break_glass is None else None
    return ImageReader(vault.blobs_at(found.store), bundle, again=asked)


def keys(vault: AnyRoom, say: Say, holder: str, ref: str, break_glass: str | None = None) -> tuple[Received, KeyBundle]:
    """The release of `ref` to `holder`, and its keys."""
    found = receive(vault, say, holder, ref, "load", break_glass)
    assert isinstance(found.bundle, KeyBundle)  # noqa: S101 - a copy bundle is that of a release to copy
    return found, found.bundle


def released(vault: AnyRoom, say: Say, lease: str | None, bundle: KeyBundle) -> tuple[Blobs, KeyBundle] | None:
    """What a further release gives of a version that was rotated since that of `bundle`, which was under `lease`. None
    where it was not rotated, or that lease holds no more, or the release would be under another by now: what would be
    refused is not asked for, nor is an approval used up that was for something else. NotFound ``weights.shredded``."""
    listed = [each for each in vault.ls(Ref.parse(bundle.ref).name) if each.ref == bundle.ref]
    for info in listed:
        if info.state == "shredded":
            raise NotFound("weights.shredded", f"{bundle.ref} was shredded at {info.shredded_at}", hint="strongroom ls")
    if not any(each.state == "active" and each.revision > bundle.revision for each in listed):
        return None
    holding = vault.custodian.show_principal(bundle.holder)["leases"]
    mine = [each for each in holding if (each["action"], each["ref"]) == ("load", bundle.ref)]
    last = max(mine, key=lambda each: int(each["expires_at"]), default=None)  # the custodian takes this one
    if (last["id"] if last is not None else None) != lease:
        return None
    found, now = keys(vault, say, bundle.holder, bundle.ref)
    return (vault.blobs_at(found.store), now) if now.revision > bundle.revision else None
