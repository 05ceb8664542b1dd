"""Lists of revoked certificates: which are believed, and what they end."""

import contextlib
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from server.provider import TrustDomain
from strongroom.crypto import svid
from strongroom.crypto.revocation import RevocationLists
from strongroom.errors import StrongroomError, Tampered, UsageError

ID = "spiffe://example.org/eval/7"


def lists(*files, domains, now=None):
    named = [(f"list-{number}", data) for number, data in enumerate(files)]
    return RevocationLists.decode(named, [each.bundle for each in domains], now or int(time.time()))


def good(chain, domain, revoked, now=None):
    try:
        svid.shown(chain, domain.bundle, now or int(time.time()), revoked)
    except Tampered:
        return False
    return True


def refused(code, *files, domains):
    with pytest.raises(UsageError) as caught:
        lists(*files, domains=domains)
    assert caught.value.code == code


def test_what_is_on_a_list_is_refused_and_nothing_else(domain):
    chain, _ = domain.svid(ID)
    other, _ = domain.svid(ID)
    revoked = lists(domain.crl(chain), domains=[domain])
    assert not good(chain, domain, revoked)
    assert good(other, domain, revoked)
    der = x509.load_pem_x509_crl(domain.crl(chain)).public_bytes(Encoding.DER)
    assert not good(chain, domain, lists(der, domains=[domain]))


def test_a_domain_without_a_list_is_as_it_was(domain):
    other = TrustDomain("other.org")
    chain, _ = other.svid("spiffe://other.org/job")
    assert good(chain, other, lists(domain.crl(), domains=[domain, other]))


def test_what_a_list_says_ends_with_it(domain):
    chain, _ = domain.svid(ID)
    before = int(time.time())
    revoked = lists(domain.crl(end=100), domains=[domain])
    now = int(time.time())
    assert before + 100 <= revoked.end <= now + 100
    assert svid.shown(chain, domain.bundle, now, revoked).until == revoked.end
    assert good(chain, domain, revoked, revoked.end - 1)
    assert not good(chain, domain, revoked, revoked.end)


def test_authorities_below_one_another(domain):
    """Whoever has issued a certificate needs a list, once its domain has any: an authority that was itself taken back
    has made none that says so."""
    below, rogue = domain.between(), domain.between()
    chain, rogues = (each.svid(ID)[0] + each.bundle for each in (below, rogue))
    root = domain.crl(rogue.bundle)
    assert not good(rogues, domain, lists(root, domains=[domain]))
    assert not good(chain, domain, lists(root, domains=[domain]))
    both = below.bundle.encode() + below.crl()
    assert good(chain, domain, lists(root, both, domains=[domain]))
    assert not good(rogues, domain, lists(both, domains=[domain]))
    # And one that was taken back is so whatever its own list says.
    own = rogue.bundle.encode() + rogue.crl()
    assert not good(rogues, domain, lists(root, own, domains=[domain]))
    refused("revocation.stranger", below.crl(), domains=[domain])


def test_lists_that_are_not_believed(domain):
    stranger = TrustDomain()  # of the same name
    refused("revocation.stranger", stranger.crl(), domains=[domain])
    refused("revocation.stranger", domain.crl(signer=stranger.key), domains=[domain])
    refused("revocation.stranger", stranger.bundle.encode() + stranger.crl(), domains=[domain])
    refused("revocation.expired", domain.crl(begin=-100, end=-1), domains=[domain])
    refused("revocation.expired", domain.crl(begin=600), domains=[domain])
    part = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)
    refused("revocation.malformed", domain.crl(extensions=[(part, True)]), domains=[domain])
    refused("revocation.malformed", domain.crl(extensions=[(part, False)]), domains=[domain])
    refused("revocation.malformed", domain.crl(extensions=[(x509.DeltaCRLIndicator(1), True)]), domains=[domain])
    refused("revocation.malformed", domain.bundle.encode(), domains=[domain])
    refused("revocation.malformed", b"", domains=[domain])
    leaf, _ = domain.svid(ID)
    refused("revocation.stranger", leaf.encode() + stranger.crl(), domains=[domain])
    # One good list does not carry another that is none.
    refused("revocation.stranger", domain.crl(), stranger.crl(), domains=[domain])


def test_a_weak_signature_is_none(domain):
    der = x509.load_pem_x509_crl(domain.crl()).public_bytes(Encoding.DER)
    ecdsa = bytes.fromhex("2a8648ce3d0403")  # and 2 for SHA-256, 1 for SHA-224
    refused("revocation.malformed", der.replace(ecdsa + b"\x02", ecdsa + b"\x01"), domains=[domain])


def test_an_older_list_takes_nothing_back(domain):
    chain, _ = domain.svid(ID)
    old, new = domain.crl(begin=-600), domain.crl(chain, begin=-60)
    now, before = lists(new, domains=[domain]), lists(old, domains=[domain])
    now.check_after(before, [domain.bundle])
    with pytest.raises(UsageError) as caught:
        before.check_after(now, [domain.bundle])
    assert caught.value.code == "revocation.older"
    for files in ((old, new), (new, old)):
        assert not good(chain, domain, lists(*files, domains=[domain]))
    assert now.digest != before.digest
    assert RevocationLists().digest == ""


def test_a_list_that_is_gone_takes_nothing_back(domain):
    """A file that another one was put in the place of: those on the list that is in force would be good again."""
    chain, _ = domain.svid(ID)
    other = TrustDomain("other.org")
    both, kept = [domain, other], other.crl()
    before = lists(domain.crl(chain), kept, domains=both)
    now = lists(kept, kept, domains=both)
    with pytest.raises(UsageError) as caught:
        now.check_after(before, [each.bundle for each in both])
    assert caught.value.code == "revocation.gone"
    now.check_after(before, [other.bundle])  # the room has no such authority any more
    before.check_after(now, [each.bundle for each in both])


CRL, OTHER = TrustDomain().crl(), TrustDomain("x.org")


@given(st.binary(max_size=64), st.integers(0, len(CRL)), st.integers(0, 8))
def test_any_bytes_are_ours_to_refuse(data, at, cut):
    with contextlib.suppress(StrongroomError):
        lists(CRL[:at] + data + CRL[at + cut :], domains=[OTHER])
