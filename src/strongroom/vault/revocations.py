"""Files of certificates that their authorities have taken back, as whoever serves a room is given them
(spec/ledger.md, section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from strongroom.crypto.revocation import FILE_MOST, RevocationLists
from strongroom.errors import UsageError
from strongroom.formats.authority import X509, Authority
from strongroom.vault.vault import Vault


class Revocations:
    """The lists in `paths`, by which certificates are judged in this process once they were taken."""

    def __init__(self, vault: Vault, paths: Sequence[Path]) -> None:
        self._vault, self._paths = vault, tuple(paths)

    def read(self) -> RevocationLists:
        """What the files have now, checked; nothing is judged by it yet. UsageError: ``revocation.unreadable``, and
        those of `RevocationLists.decode` and `check_after`."""
        custodian = self._vault.custodian
        with custodian.ledger.view() as state:
            authorities = [Authority.decode(text) for text in state.authorities.values()]
            today = max(self._vault.clock(), state.latest)
        bundles = [each.bundle for each in authorities if each.kind == X509]
        found = RevocationLists.decode([(path.name, _content(path)) for path in self._paths], bundles, today)
        found.check_after(self.taken, bundles)
        return found

    def take(self, lists: RevocationLists) -> None:
        """From now on certificates are judged by `lists`."""
        self._vault.custodian.logins.revoked = lists

    @property
    def taken(self) -> RevocationLists:
        """Those in force."""
        return self._vault.custodian.logins.revoked

    def end(self) -> int | None:
        """When the first of those in force ends, in seconds; None without any."""
        return self.taken.end


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MOST + 1)
    except OSError as error:
        raise UsageError(
            "revocation.unreadable", f"can't read {path}: {error.strerror}", hint="--crl FILE, PEM or DER"
        ) from None
    if len(data) > FILE_MOST:
        raise UsageError("revocation.unreadable", f"{path} is longer than {FILE_MOST >> 20} MiB", hint="--crl FILE")
    return data
