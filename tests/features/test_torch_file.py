"""Tensors of torch's files are read without torch, and nothing that a file asks for is executed."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from gemma3_jax.features.torch_file import read_torch_file
from gemma3_jax.reading import CheckpointError


def test_tensors_of_every_layout_and_dtype(tmp_path):
    """Views, parameters, numbers and shared storages."""
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "parameter": torch.nn.Parameter(base),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3, dtype=torch.int32),
        **{str(dtype): base.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64)},
        "bool": base > 3,
    }
    torch.save(state, tmp_path / "ae.pt")
    found = read_torch_file(tmp_path / "ae.pt")
    assert set(found) == set(state)
    for key, tensor in state.items():
        np.testing.assert_array_equal(found[key].astype(np.float64), tensor.detach().double().numpy())
    assert found["torch.bfloat16"].dtype.name == "bfloat16"


def test_a_state_dict_with_metadata(tmp_path):
    """As `module.state_dict()` gives it, also on a device that is not here."""
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "ae.pt")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "ae.pt")["weight"], module.weight.detach().numpy())


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(file, content, compression=zipfile.ZIP_STORED, **members):
    """A zip file like torch's, with this pickle."""
    with zipfile.ZipFile(file, "w", compression) as written:
        written.writestr("archive/data.pkl", content)
        for name, member in members.items():
            written.writestr(f"archive/data/{name}", member)


@pytest.mark.parametrize("function", [os.system, eval, getattr, __import__, torch.load, np.load])
def test_a_hostile_pickle_is_refused(function, tmp_path):
    """Whatever it calls; as the whole file, or as one value among tensors. Nothing is executed."""
    for hostile in (Calls(function, f"touch {tmp_path}/ran"), {"weight": torch.ones(2), "x": Calls(function, "0")}):
        torch.save(hostile, tmp_path / "ae.pt")
        with pytest.raises(CheckpointError, match="nothing is executed"):
            read_torch_file(tmp_path / "ae.pt")
    assert not (tmp_path / "ran").exists()
    os.system(f"touch {tmp_path}/ran")  # control
    assert (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """Attributes that it sets on what the reader allows are ignored or refused; later files are read as before."""
    good = tmp_path / "good.pt"
    torch.save({"w": torch.ones(2)}, good)
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"):
        for state in (b"}", b"(N}U\x0b__doctest__K\x01st"):
            archive(tmp_path / "ae.pt", name + state + b"b.")
            with pytest.raises(CheckpointError):
                read_torch_file(tmp_path / "ae.pt")
    np.testing.assert_array_equal(read_torch_file(good)["w"], [1, 1])


def storage(key="0", size=4, kind="storage", dtype=b"ctorch\nFloatStorage\n"):
    """The opcodes of a storage."""
    texts = [b"V" + text.encode() + b"\n" for text in (kind, key, "cpu")]
    return b"(" + texts[0] + dtype + texts[1] + texts[2] + b"I" + str(size).encode() + b"\nt" + b"Q"


def tensor(storage, offset, shape, strides):
    """The opcodes of a state dict with one tensor."""
    numbers = [b"(" + b"".join(b"I%d\n" % n for n in axes) + b"t" for axes in (shape, strides)]
    arguments = storage + b"I%d\n" % offset + numbers[0] + numbers[1] + b"I00\nN"
    return b"}Vw\nctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def test_a_damaged_file_is_refused(tmp_path):
    """Tensors that leave their storage, storages that are missing or short, compressed or truncated files."""
    file, four = tmp_path / "ae.pt", {"0": np.ones(4, np.float32).tobytes()}
    archive(file, tensor(storage(), 0, (2, 2), (2, 1)), **four)
    np.testing.assert_array_equal(read_torch_file(file)["w"], np.ones((2, 2)))  # control
    for content in (
        tensor(storage(), 1, (2, 2), (2, 1)),
        tensor(storage(), 0, (2, 2), (1000, 1)),
        tensor(storage(), -1, (2,), (1,)),
        tensor(storage(), 0, (2, 2), (-1, 1)),
        tensor(storage(), 0, (2, 2), (1,)),
        tensor(storage(size=2**40), 0, (2,), (1,)),
        tensor(storage(key="9"), 0, (2,), (1,)),
        tensor(storage(kind="module"), 0, (2,), (1,)),
        tensor(storage(dtype=b"Vobject\n"), 0, (2,), (1,)),
        b"\x80\x04.",
        b"",
    ):
        archive(file, content, **four)
        with pytest.raises(CheckpointError, match=r"ae\.pt"):
            read_torch_file(file)
    archive(file, tensor(storage(), 0, (4,), (1,)), zipfile.ZIP_DEFLATED, **four)
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(file)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="damaged"):
        read_torch_file(file)


def test_other_files_are_refused(tmp_path):
    """A module, a list, a file of torch before 1.6, and no file."""
    file = tmp_path / "ae.pt"
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(CheckpointError, match=r"refers to torch\.nn.*Save the state dict alone"):
        read_torch_file(file)
    for content in ([torch.ones(2)], {"w": 3}, collections.OrderedDict(w={"x": torch.ones(2)}), {3: torch.ones(2)}):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match="does not have a state dict"):
            read_torch_file(file)
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a zip file"):
        read_torch_file(file)
    file.write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="not a zip file"):
        read_torch_file(file)
    with pytest.raises(CheckpointError, match="is missing"):
        read_torch_file(tmp_path / "none.pt")
