"""Promises of the files that are read and written a tensor at a time: the library of safetensors does the same."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.errors import LorakitError, UserError
from lorakit.model.base_files import INDEX, SINGLE, list_tensors, read_header, weight_files
from lorakit.model.safetensors_io import TYPES, open_writer, pieces, read_tensor

SHAPES = [(), (0, 4), (5,), (3, 7), (2, 3, 4)]


def some_of(dtype, shape):
    torch.manual_seed(0)
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    return (torch.randn(shape) * 20).to(dtype)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())


@pytest.fixture
def stored(tmp_path):
    """A file with every type in several shapes."""
    tensors = {f"{word}.{len(shape)}": some_of(dtype, shape) for word, dtype in TYPES.items() for shape in SHAPES}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "by": "a test"})
    return tensors


def test_every_type_and_shape_is_read_as_the_library_reads_it(stored, tmp_path):
    found = list_tensors(tmp_path)
    assert found.keys() == stored.keys()
    expected = load_file(tmp_path / SINGLE)
    for name, one in found.items():
        assert same(read_tensor(one), expected[name]), name
        assert read_tensor(one, torch.float32).dtype == torch.float32
        assert torch.equal(read_tensor(one, torch.float32), expected[name].float()), name
    assert read_header(tmp_path / SINGLE)[1] == {"format": "pt", "by": "a test"}


def test_pieces_are_the_rows_in_float32_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.model.safetensors_io.CONVERTED_AT_ONCE", 20)
    wide = {
        "tall": torch.randn(33, 6),
        "wide": torch.randn(3, 50),
        "flat": torch.randn(41),
        "deep": torch.randn(5, 2, 3),
    }
    save_file({name: value.to(torch.bfloat16) for name, value in wide.items()}, tmp_path / SINGLE)
    for name, one in list_tensors(tmp_path).items():
        rows = [(row, piece.clone()) for row, piece in pieces(one)]
        assert len(rows) > 1 and rows[0][0] == 0
        assert [row for row, _ in rows[1:]] == [row + len(piece) for row, piece in rows[:-1]]
        assert torch.equal(torch.cat([piece for _, piece in rows]), wide[name].to(torch.bfloat16).float())
        assert torch.equal(read_tensor(one, torch.float32), wide[name].to(torch.bfloat16).float())


def test_what_is_written_in_any_order_the_library_reads(stored, tmp_path):
    found = list_tensors(tmp_path)
    with open_writer(tmp_path / "again.safetensors", found, {"by": "us"}) as file:
        for number, (name, one) in enumerate(sorted(found.items(), key=lambda item: item[0][::-1])):
            value = read_tensor(one)
            if number % 3 == 0:
                file.copy(name, one)
            elif number % 3 == 1 or not value.ndim:
                file.put(name, value)
            else:
                for row in reversed(range(len(value))):
                    file.put(name, value[row : row + 1], row)
    expected, again = load_file(tmp_path / SINGLE), load_file(tmp_path / "again.safetensors")
    assert again.keys() == expected.keys()
    assert all(same(value, expected[name]) for name, value in again.items())
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}


def test_numbers_are_rounded_to_the_type_that_was_announced(tmp_path):
    value = torch.randn(100, 3) * 100
    save_file({"a": value}, tmp_path / SINGLE)
    planned = {"a": replace(list_tensors(tmp_path)["a"], dtype="BF16")}
    with open_writer(tmp_path / "b.safetensors", planned, {}) as file:
        file.put("a", value)
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], value.to(torch.bfloat16))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e6])
def test_a_number_that_the_type_does_not_hold_is_refused_by_name(tmp_path, number):
    save_file({"layer.weight": torch.zeros(4, 4)}, tmp_path / SINGLE)
    planned = {"layer.weight": replace(list_tensors(tmp_path)["layer.weight"], dtype="F16")}
    value = torch.zeros(4, 4)
    value[2, 3] = number
    with (
        pytest.raises(LorakitError, match=r"layer\.weight: holds numbers that are not finite in float16"),
        open_writer(tmp_path / "b.safetensors", planned, {}) as file,
    ):
        file.put("layer.weight", value)


def test_large_finite_numbers_whose_sum_is_not_are_fine(tmp_path):
    value = torch.full((8,), 3e38)
    save_file({"a": value}, tmp_path / SINGLE)
    with open_writer(tmp_path / "b.safetensors", list_tensors(tmp_path), {}) as file:
        file.put("a", value)
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], value)


@pytest.mark.parametrize(
    "rows",
    [[], [(0, 2)], [(0, 4), (0, 4)], [(0, 4), (3, 2)], [(0, 5)]],
    ids=["none", "some", "twice", "beyond", "too many"],
)
def test_a_tensor_that_is_not_written_as_announced_is_a_fault(tmp_path, rows):
    save_file({"a": torch.zeros(4, 4)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="announced"), open_writer(tmp_path / "b", list_tensors(tmp_path), {}) as file:
        for row, count in rows:
            file.put("a", torch.zeros(count, 4), row)


def test_no_file_stays_open_whatever_happens(tmp_path):
    save_file({"a": torch.zeros(4, 4)}, tmp_path / SINGLE)
    tensors = list_tensors(tmp_path)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    read_tensor(tensors["a"])
    for _, _ in pieces(tensors["a"]):
        pass
    with pytest.raises(ValueError, match="announced"), open_writer(tmp_path / "b", tensors, {}):
        pass
    far = {"a": replace(tensors["a"], shape=(1 << 58,))}  # more than any disk holds
    with pytest.raises(OSError), open_writer(tmp_path / "c", far, {}):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_file_cut_at_any_byte_or_grown_is_damaged(tmp_path):
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(3)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for wrong in [*(whole[:end] for end in range(len(whole))), whole + b"\0"]:
        (tmp_path / SINGLE).write_bytes(wrong)
        with pytest.raises(UserError, match=r"model\.safetensors: this weights file is damaged"):
            list_tensors(tmp_path)


def entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 4), "b": entry(0, 4)},
        {"a": entry(0, 4), "b": entry(8, 12)},
        {"a": entry(0, 8)},
        {"a": entry(0, 8, shape=(2, 2))},
        {"a": entry(4, 0), "b": entry(0, 8)},
        {"a": entry(0, 8, shape=(-2, -1))},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 3},
        [],
    ],
)
def test_a_header_that_does_not_fit_the_bytes_is_damaged(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match="damaged"):
        list_tensors(tmp_path)


def test_an_unknown_type_is_named_only_when_it_is_read(tmp_path):
    text = json.dumps({"a": entry(0, 8, "F4", (16,))}).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    (one,) = list_tensors(tmp_path).values()
    with pytest.raises(UserError, match="of the type F4, which cannot be read"):
        read_tensor(one)


def test_shards_are_those_that_the_index_names(tmp_path):
    for number in (1, 2, 3):
        save_file({f"t{number}": torch.full((2,), float(number))}, tmp_path / f"part-{number}.safetensors")
    index = tmp_path / INDEX
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"t1": "part-1.safetensors", "t2": "part-2.safetensors"}})
    )
    assert [file.name for file in weight_files(tmp_path)] == ["part-1.safetensors", "part-2.safetensors"]
    assert list(list_tensors(tmp_path)) == ["t1", "t2"]
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks part-2\.safetensors"):
        list_tensors(tmp_path)
    mapped = '"weight_map": {"t1": "part-1.safetensors"}'
    odd = ['"weight_map": 3', '"weight_map": {}', '"weight_map": {"t1": 4}', mapped, f'"metadata": "no", {mapped}']
    for text in ("{", "{}", "[]", "[" * 9999, *(f"{{{keys}}}" for keys in odd)):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            list_tensors(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match="is not a model folder"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a single file"])
def test_an_index_names_no_file_that_lies_elsewhere(tmp_path, beside):
    """Only the folder's own files are known by their sha256."""
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path / "far.safetensors", folder / "own.safetensors", folder / "own.bin"):
        save_file({"t": torch.zeros(2)}, place)
    (folder / "inner").mkdir()
    save_file({"t": torch.zeros(2)}, folder / "inner" / "own.safetensors")
    if beside:
        save_file({"t": torch.zeros(2)}, folder / SINGLE)
    for name in ("../far.safetensors", str(tmp_path / "far.safetensors"), "inner/own.safetensors", "own.bin", "."):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"s": "own.safetensors", "t": name}}))
        with pytest.raises(UserError, match=re.escape(f"names {name!r}")):
            weight_files(folder)


def test_an_index_that_names_nothing_as_a_file_is_damaged(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"s": "own.safetensors", "t": None}}))
    with pytest.raises(UserError, match="damaged: its weight_map names None"):
        weight_files(tmp_path)


def test_weights_may_be_links(tmp_path):
    """As the hub's cache has them, and whoever tries a configuration on weights that lie elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"t": torch.zeros(2)}, tmp_path / "far.safetensors")
    (folder / "own.safetensors").symlink_to(tmp_path / "far.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"t": "own.safetensors"}}))
    assert weight_files(folder) == [folder / "own.safetensors"]
    (folder / SINGLE).symlink_to("../far.safetensors")
    assert weight_files(folder) == [folder / SINGLE]
    assert list_tensors(folder)["t"].shape == (2,)
