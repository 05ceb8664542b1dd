"""Code words: the same on every machine, different for each holder, and of the density that the scheme asks for."""

import hashlib

import numpy as np

from strongroom.marking.code import COLLUDERS, Code, bias_table

KEY = bytes(range(32))


def bits(word, positions):
    return np.unpackbits(np.frombuffer(word, np.uint8), bitorder="little")[:positions]


def test_the_bias_table_is_symmetric_and_cut_off():
    table = bias_table()
    assert table.size == 256
    assert np.all(np.diff(table.astype(np.int64)) > 0)
    assert np.all(table + table[::-1] == 65536)
    assert table[0] >= 65536 / (300 * COLLUDERS)


def test_no_entry_is_near_a_rounding_boundary():
    # so that no machine's sine can round it the other way
    import math

    least = math.asin(math.sqrt(1 / (300 * COLLUDERS)))
    for k in range(256):
        value = 65536 * math.sin(least + (math.pi / 2 - 2 * least) * (k + 0.5) / 256) ** 2
        assert abs(value % 1 - 0.5) > 1e-6


def test_words_are_reproducible():
    word = Code(KEY, 16384).word("user/ana")
    assert len(word) == 2048
    assert hashlib.sha256(word).hexdigest() == "516f20ab532eb14e25fc251f779c19e79eb8a6c24fc08795e6336b8b00a655ad"


def test_holders_versions_and_paths_have_words_of_their_own():
    words = {
        Code(key, 1024).word(holder) for key in (KEY, KEY[::-1]) for holder in ("user/ana", "user/ben", "team/ana")
    }
    assert len(words) == 6


def test_a_shorter_version_of_the_code_is_its_prefix():
    assert Code(KEY, 1000).word("user/ana")[:124] == Code(KEY, 5000).word("user/ana")[:124]


def test_bits_follow_their_biases():
    code = Code(KEY, 2000)
    words = np.array([bits(code.word(f"user/h{k}"), 2000) for k in range(600)])
    expected = code.biases / 65536
    spread = np.sqrt(expected * (1 - expected) / 600)
    assert np.all(np.abs(words.mean(0) - expected) < 6 * spread + 1e-3)
