"""Whatever is in manifest, index, members and settings: the right data or one clear error, never anything else.

Two kinds of damage: bytes that changed by themselves, where the hashes tell, and files that a stranger wrote, whose
hashes fit. Of the first nothing may come but the same batches or an error; of the second no traceback, hang or huge
allocation. FUZZ=50 makes 50 times as many examples.
"""

import copy
import io
import json
import os
import resource
import shutil

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig, FinetuneRecipe, PretrainRecipe
from pipeline.data.loader import Loader
from pipeline.data.manifest import INDEX_SCHEMA, load_index, load_manifest
from pipeline.data.npy import Array, decode, header
from pipeline.errors import UserError
from pipeline.recipes import flatten, load_recipe
from tests.helpers import edit_manifest, synth_shards, write_index

FACTOR = int(os.environ.get("FUZZ", "1"))
MEMORY = 1 << 19  # KB that the process may grow by


def examples(count):
    return settings(
        max_examples=FACTOR * count, deadline=None, derandomize=FACTOR == 1,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], print_blob=True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz")
    synth_shards(out, clips=48, seconds=0.1, per_shard=6)
    return out


@pytest.fixture
def work(original, tmp_path):
    """A copy; each example starts with `restore`."""
    for path in original.glob("*.tar"):
        shutil.copy(path, tmp_path)
    return tmp_path


def restore(original, work):
    for name in ("manifest.json", "index.parquet", "failures.jsonl"):
        shutil.copy(original / name, work / name)


def epoch(shards):
    """What training on these shards sees, class weights included, and what evaluation sees."""
    found = []
    for part, sampler, fold in (("train", "balanced", 0), ("train", "shuffle", 1), ("eval", "shuffle", 0)):
        data = DataConfig(shards=str(shards), workers=0, streams=2, window=4, sampler=sampler, fold=fold,
                          max_bad_share=1)  # fmt: skip
        with Loader(data, part, waveform=False, batch_size=4, seed=1) as loader:
            batches = loader.batches()
            for _, batch in zip(range(5), batches, strict=False):
                found.append((loader.keys(batch.row.tolist()), batch.targets.tolist(), batch.fbank.sum().item()))
            batches.close()
    return found


def or_refused(call, *words):
    """What a call returns; None: it ended with the one error that a user may see, of a length that can be read."""
    try:
        return call(*words)
    except UserError as error:
        said = str(error)
    assert 0 < len(said) < 2000
    return None


@st.composite
def damaged(draw, content):
    """Flipped bits, a piece cut off, zeroed, doubled or replaced."""
    out = bytearray(content)
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "zero", "double", "replace", "append"]))
    first = draw(st.integers(0, len(out) - 1))
    size = draw(st.integers(1, 64))
    if kind == "flip":
        for bit in draw(st.lists(st.integers(0, 8 * len(out) - 1), min_size=1, max_size=3)):
            out[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        del out[first:]
    elif kind == "zero":
        out[first : first + size] = bytes(len(out[first : first + size]))
    elif kind == "double":
        out[first:first] = out[first : first + size]
    elif kind == "replace":
        out[first : first + size] = draw(st.binary(min_size=1, max_size=64))
    else:
        out += draw(st.binary(min_size=1, max_size=64))
    return bytes(out)


@given(data=st.data())
@examples(60)
def test_an_index_that_changed_by_itself(original, work, data):
    restore(original, work)
    content = data.draw(damaged((original / "index.parquet").read_bytes()))
    assume(content != (original / "index.parquet").read_bytes())
    (work / "index.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.parquet: "):
        epoch(work)


@given(data=st.data())
@examples(60)
def test_a_manifest_that_changed_by_itself(original, work, data):
    restore(original, work)
    (work / "manifest.json").write_bytes(data.draw(damaged((original / "manifest.json").read_bytes())))
    assert or_refused(load_manifest, work) in (None, load_manifest(original))


@given(data=st.data())
@examples(40)
def test_an_index_that_a_stranger_damaged(original, work, data):
    """Parquet of any kind, whose hash is the manifest's."""
    restore(original, work)
    (work / "index.parquet").write_bytes(data.draw(damaged((original / "index.parquet").read_bytes())))
    edit_manifest(work, lambda content: None)
    or_refused(epoch, work)


NUMBERS = [0, 1, -1, 13, 255, -(1 << 15), (1 << 15) - 1, 1 << 31, 1 << 40, -(1 << 63), (1 << 63) - 1, (1 << 64) - 1]
FLOATS = [0.0, -1.0, 1e9, 1e308, float("inf"), -float("inf"), float("nan")]
NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "http://127.0.0.1:9/x.tar", "x\0y", "x\n", "x" * 5000,
         "\u202e", "$x$"]  # fmt: skip


@given(data=st.data())
@examples(30)
def test_rows_that_a_stranger_wrote(original, work, data):
    restore(original, work)
    rows = load_index(original).to_pylist()
    field = data.draw(st.sampled_from(list(INDEX_SCHEMA)))
    kind = field.type
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind):
        value = data.draw(st.sampled_from([*NAMES, "eval", "train-000000.tar", None]))
    elif pa.types.is_list(kind):
        value = data.draw(st.lists(st.sampled_from([*[n for n in NUMBERS if abs(n) < 1 << 31], None]), max_size=3))
    elif pa.types.is_floating(kind):
        value = data.draw(st.sampled_from([*FLOATS, None]))
    elif pa.types.is_boolean(kind):
        value = None
    else:
        low, high = (0, 1 << 64) if kind == pa.uint64() else (-(1 << kind.bit_width - 1), 1 << kind.bit_width - 1)
        value = data.draw(st.sampled_from([*[n for n in NUMBERS if low <= n < high], None]))
    for row in data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1, max_size=3)):
        rows[row][field.name] = value
    write_index(work, pa.Table.from_pylist(rows, INDEX_SCHEMA))
    or_refused(epoch, work)


def places(content, path=()):
    """Every part of a JSON value."""
    yield path
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


VALUES = [None, True, [], {}, [[]], "", [1] * 1000, {"a": {}}, *NUMBERS, 10**30, *FLOATS, *NAMES, "0" * 64,
          "../" * 21 + "a"]  # fmt: skip


def with_change(data, content):
    """A value elsewhere, another value, one more or less."""
    content = copy.deepcopy(content)
    *above, last = data.draw(st.sampled_from([path for path in places(content) if path]))
    holder = content
    for key in above:
        holder = holder[key]
    kind = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "twice", "rename", "nest"]))
    value = data.draw(st.sampled_from(VALUES))
    if kind == "remove":
        del holder[last]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(holder[last])
    elif kind == "rename" and isinstance(holder, dict):
        holder[data.draw(st.sampled_from(NAMES))] = holder.pop(last)
    elif kind == "nest":
        depth = data.draw(st.sampled_from([3, 200, 900]))
        holder[last] = json.loads("[" * depth + "]" * depth)
    else:
        holder[last] = value
    return content


@given(data=st.data())
@examples(80)
def test_a_manifest_that_a_stranger_wrote(original, work, data):
    restore(original, work)
    content = with_change(data, json.loads((original / "manifest.json").read_text()))
    (work / "manifest.json").write_text(json.dumps(content))
    if isinstance(content.get("index"), dict) and "digest" in content:
        before = content["index"]
        edit_manifest(work, lambda content: content.update(index=before))  # the digest fits
    or_refused(epoch, work)


ARRAYS = [Array("<i2", (160,)), Array("<f2", (16, 10))]


@given(data=st.data(), array=st.sampled_from(ARRAYS))
@examples(200)
def test_members_that_are_no_such_array(data, array):
    """An array that comes out is the right one: its type, shape and order, and the bytes at its end."""
    payload = np.arange(160, dtype=array.dtype).tobytes()
    if data.draw(st.booleans()):
        member = data.draw(damaged(header(array) + payload))
    else:  # another array of NumPy's
        shape = data.draw(st.sampled_from([(160,), (16, 10), (10, 16), (160, 1), (320,), (80,), (0,), (1 << 40,)]))
        kind = data.draw(st.sampled_from(["<i2", ">i2", "<u2", "<f2", ">f2", "<f8", "|O", "|S2", "<M8[s]"]))
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            out, {"descr": kind, "fortran_order": data.draw(st.booleans()), "shape": shape}
        )
        member = out.getvalue() + payload
    try:
        found = decode(member, array)
    except ValueError:
        return
    assert (found.dtype.str, found.shape) == array
    assert found.flags.c_contiguous
    assert found.tobytes() == member[-array.size :]


KEYS = sorted(flatten(FinetuneRecipe()))
TEXTS = ["", "~", "null", "[", "{a: b}", "1e999", ".nan", ".inf", "-1", "0x7fffffffffffffff", "9" * 400, "[" * 3000,
         "&a [*a]", "!!python/object/apply:os.system [id]", "2024-01-01", "\x00", "\ud800", "a: b: c", "- 1\n- 2", "'",
         "\t", "yes"]  # fmt: skip


@given(
    kind=st.sampled_from([PretrainRecipe, FinetuneRecipe]),
    words=st.lists(
        st.one_of(
            st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(st.sampled_from(TEXTS), st.text(max_size=20))),
            st.builds("{}={}".format, st.text(max_size=12), st.sampled_from(TEXTS)),
            st.text(max_size=30),
        ),
        max_size=3,
    ),
)
@examples(80)
def test_words_of_a_command_line(kind, words):
    found = or_refused(load_recipe, kind, [], words)
    assert found is None or isinstance(found, kind)


@given(data=st.data())
@examples(30)
def test_yaml_files_of_settings(tmp_path, data):
    content = FinetuneRecipe().model_dump(mode="json")
    text = yaml.safe_dump(with_change(data, content)) if data.draw(st.booleans()) else ""
    file = tmp_path / "settings.yaml"
    file.write_bytes(data.draw(damaged(yaml.safe_dump(content).encode())) if not text else text.encode())
    found = or_refused(load_recipe, FinetuneRecipe, [file], [])
    assert found is None or isinstance(found, FinetuneRecipe)


@pytest.mark.slow
def test_every_bit_of_a_piece_of_the_index_that_flips_is_noticed(original, work):
    """2000 bits, one after the other: training never sees them."""
    restore(original, work)
    content = (original / "index.parquet").read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(content), 2000, replace=False).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (work / "index.parquet").write_bytes(flipped)
        with pytest.raises(UserError, match=r"its sha256 is not that of manifest\.json"):
            epoch(work)


def test_what_is_whole_is_read(original, work):
    """The functions above refuse nothing that is right."""
    restore(original, work)
    assert len(epoch(work)) == 13
    edit_manifest(work, lambda content: None)
    assert epoch(work)
