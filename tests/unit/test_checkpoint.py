"""Checkpoints come back bit for bit under any cut, and what is damaged or unfinished is refused by name."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from embedshard.errors import CheckpointError, PeerError
from embedshard.storage import Location, locate
from embedshard.train.checkpoint import (
    Checkpointer,
    Piece,
    find_steps,
    newest_intact,
    offer,
    open_checkpoint,
    open_step,
    prune,
    step_folder,
)
from embedshard.train.checkpoint_files import files_at_once
from embedshard.train.checkpoint_format import DTYPES, seal

pytestmark = pytest.mark.timeout(60)


def whole(name, tensor):
    return Piece(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def random_tensor(shape, dtype, seed=0):
    """Any bits at all, NaN and denormal numbers too."""
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (data % 2).view(dtype).reshape(shape) if dtype == torch.bool else data.view(dtype).reshape(shape)


def save(root, step, tensors, attempt="1", state=None, mode="blocking", **options):
    save_options = {name: options.pop(name) for name in ("keep", "protect") if name in options}
    with Checkpointer(root, 0, 1, attempt, mode=mode, **options) as checkpointer:
        checkpointer.save(step, [whole(name, tensor) for name, tensor in tensors.items()], state or {}, **save_options)


def load(checkpoint):
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in checkpoint.tensors.items()}
    checkpoint.read_into([whole(name, tensor) for name, tensor in tensors.items()])
    return tensors


def assert_holds(checkpoint, tensors):
    found = load(checkpoint)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.fixture
def root(tmp_path):
    return locate(str(tmp_path / "checkpoints"))


@pytest.fixture(params=["disk", "object store"])
def any_root(request, tmp_path):
    if request.param == "disk":
        return locate(str(tmp_path / "checkpoints"))
    return locate("checkpoints", fs._MockFileSystem())


@pytest.mark.parametrize("mode", ["blocking", "background", "auto"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(any_root, mode):
    shapes = [(), (1,), (7,), (5, 3), (2, 3, 4), (0, 8), (3, 0)]
    tensors = {
        f"{name}/{len(shape)}-{i}": random_tensor(shape, dtype, seed=i)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    }
    state = {"step": 3, "lr": 1e-05, "best": None, "nested": {"ü": [1, 2.5, "x"]}, "nan": float("inf")}
    save(any_root, 3, tensors, state=state, mode=mode, max_file_bytes=4096)
    checkpoint = open_step(any_root, 3)
    assert (checkpoint.step, checkpoint.attempt, checkpoint.world_size) == (3, "1", 1)
    assert checkpoint.state == state
    assert_holds(checkpoint, tensors)
    checkpoint.verify()
    assert checkpoint.folder.name == "step-00000003"
    assert max(step_folder(any_root, 3).join(name).size() for name in checkpoint.folder.list_names()[:-1]) <= 4096


def test_live_views_of_any_strides_are_saved_and_filled(root):
    table = random_tensor((10, 8), torch.float32).nan_to_num()
    weight = torch.nn.Parameter(torch.zeros(8, 10))
    save(root, 1, {"columns": table[:, 2:5], "turned": table.t(), "rows": table[3:7], "again": table[3:7]})
    target = torch.zeros(10, 8)
    open_step(root, 1).read_into([("columns", (0, 0), target[:, 2:5]), ("turned", (0, 0), weight)])
    assert torch.equal(target[:, 2:5], table[:, 2:5])
    assert not target[:, :2].any()
    assert torch.equal(weight, table.t())
    assert_holds(
        open_step(root, 1), {"columns": table[:, 2:5], "turned": table.t(), "rows": table[3:7], "again": table[3:7]}
    )


def test_files_stay_below_their_size_and_large_pieces_are_cut(root):
    tensors = {"large": random_tensor((300, 16), torch.float32), "wide": random_tensor((1, 5000), torch.int64)}
    tensors |= {f"small{i}": random_tensor((9,), torch.float16, i) for i in range(30)}
    save(root, 1, tensors, max_file_bytes=4096)
    files = list(Path(step_folder(root, 1).path).glob("*.safetensors"))
    assert len(files) > 10
    assert max(file.stat().st_size for file in files) <= 4096
    assert {file.name[:9] for file in files} == {"1-r00000-"}
    assert_holds(open_step(root, 1), tensors)


@st.composite
def tilings(draw, shape):
    """Cuts a shape into blocks, as (offset, shape)."""
    blocks = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        offset, size = blocks.pop(draw(st.integers(0, len(blocks) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[axis]))
        for first, length in ((0, cut), (cut, size[axis] - cut)):
            blocks.append(
                (
                    tuple(at + first if i == axis else at for i, at in enumerate(offset)),
                    tuple(length if i == axis else at for i, at in enumerate(size)),
                )
            )
    return blocks


@st.composite
def reshardings(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8]))
    shapes = draw(st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=3))
    writers, readers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cuts = [
        [[(draw(st.integers(0, world - 1)), *block) for block in draw(tilings(shape))] for shape in shapes]
        for world in (writers, readers)
    ]
    return dtype, shapes, (writers, cuts[0]), (readers, cuts[1]), draw(st.sampled_from([300, 1000, 10**6]))


def block(tensor, offset, shape):
    return tensor[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(reshardings())
def test_what_some_ranks_saved_in_one_cut_others_read_in_another(resharding):
    dtype, shapes, (writers, saved), (readers, wanted), max_file_bytes = resharding
    root = locate("checkpoints", fs._MockFileSystem())
    tensors = [random_tensor(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    ranks = [Checkpointer(root, rank, writers, "1", "background", 0, max_file_bytes) for rank in range(writers)]
    for rank, checkpointer in enumerate(ranks):
        pieces = [
            Piece(f"t{i}", block(tensors[i], offset, shape), offset, shapes[i])
            for i, cut in enumerate(saved)
            for owner, offset, shape in cut
            if owner == rank
        ]
        checkpointer.save(1, pieces, {})
    for checkpointer in ranks:
        checkpointer.wait()
    checkpoint = open_step(root, 1)
    found = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    for rank in range(readers):
        checkpoint.read_into(
            [
                (f"t{i}", offset, block(found[i], offset, shape))
                for i, cut in enumerate(wanted)
                for owner, offset, shape in cut
                if owner == rank
            ]
        )
    for tensor, other in zip(tensors, found, strict=True):
        assert torch.equal(bits(tensor), bits(other))
    assert not [name for name in step_folder(root, 1).list_names() if name.endswith((".json", ".failed"))][:-1]


# --------------------------------------------------------------------------------------------------------------- refusals
def rewrite(folder, change):
    """Changes a manifest as someone would who also makes its SHA-256 right again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(seal(manifest))


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


def flip_data(folder):
    file = files_of(folder)[1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)


def truncate(folder):
    os.truncate(files_of(folder)[1], files_of(folder)[1].stat().st_size - 1)


def remove_file(folder):
    files_of(folder)[1].unlink()


def swap(folder):
    first, second = files_of(folder)[1:3]
    assert first.stat().st_size == second.stat().st_size
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])


def replace_by_folder(folder):
    remove_file(folder)
    (folder / "1-r00000-00001.safetensors").mkdir()


def other_content(folder):
    """A valid file of another dtype, with size and SHA-256 put right."""
    file = files_of(folder)[1]
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    rewrite(folder, lambda manifest: manifest["files"][1].update(sha256=digest))


def no_safetensors(folder):
    file = files_of(folder)[1]
    file.write_bytes(b"\xff" * file.stat().st_size)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    rewrite(folder, lambda manifest: manifest["files"][1].update(sha256=digest))


def set_file(name):
    def change(manifest):
        former = manifest["files"][1]["name"]
        manifest["files"][1]["name"] = name
        for piece in manifest["pieces"]:
            piece["file"] = name if piece["file"] == former else piece["file"]

    return lambda folder: rewrite(folder, change)


def set_piece(**values):
    return lambda folder: rewrite(folder, lambda manifest: manifest["pieces"][1].update(values))


def other_step(folder):
    rewrite(folder, lambda manifest: manifest.update(step=77))


FILE = "step-00000200/1-r00000-00001.safetensors"
MANIFEST = "step-00000200/manifest.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_data, [FILE, "is damaged", "SHA-256"]),
        (truncate, [FILE, "cut off or replaced", "the manifest says"]),
        (remove_file, [FILE, "is missing"]),
        (swap, [FILE, "is damaged"]),
        (replace_by_folder, [FILE, "is missing"]),
        (other_content, [FILE, "torch.int32", "float32"]),
        (no_safetensors, [FILE, "is not a safetensors file"]),
        (lambda folder: (folder / "manifest.json").unlink(), ["step-00000200 has no manifest", "did not finish"]),
        (lambda folder: os.truncate(folder / "manifest.json", 100), [MANIFEST, "is damaged"]),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[]"), [MANIFEST, "is damaged"]),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), [MANIFEST, "is damaged"]),
        (set_file("../../../../etc/passwd"), [MANIFEST, "'../../../../etc/passwd'", "no plain name"]),
        (set_file("/etc/passwd"), [MANIFEST, "'/etc/passwd'"]),
        (set_file("a/b.safetensors"), [MANIFEST, "'a/b.safetensors'"]),
        (set_file("..safetensors"), [MANIFEST, "'..safetensors'"]),
        (set_file("a\\b.safetensors"), [MANIFEST]),
        (set_file("1-r00000-00000.safetensors"), [MANIFEST, "names a file twice"]),
        (set_piece(file="lost.safetensors"), [MANIFEST, "'lost.safetensors'"]),
        (set_piece(offset=[3, 0]), [MANIFEST, "'table'", "overlap"]),
        (set_piece(shape=[1, 8]), [MANIFEST, "'table'", "elements are in none"]),
        (set_piece(shape=[1000, 8]), [MANIFEST, "'table'", "reaches outside"]),
        (set_piece(offset=[-1, 0]), [MANIFEST, "pieces.1.offset.0"]),
        (set_piece(offset=[0]), [MANIFEST, "another number of axes"]),
        (set_piece(shape=["8", 8]), [MANIFEST, "pieces.1.shape.0"]),
        (set_piece(name="other"), [MANIFEST, "'other'"]),
        (set_piece(key="other"), [FILE, "does not hold 'other'"]),
        (lambda folder: rewrite(folder, lambda m: m["files"][1].update(size=2**70)), [MANIFEST, "files.1.size"]),
        (lambda folder: rewrite(folder, lambda m: m["files"][1].update(size=2**50)), [FILE, f"{2**50:,}"]),
        (lambda folder: rewrite(folder, lambda m: m["tensors"]["table"].update(dtype="object")), [MANIFEST, "object"]),
        (lambda folder: rewrite(folder, lambda m: m.pop("files")), [MANIFEST, "files"]),
        (lambda folder: rewrite(folder, lambda m: m.update(format=2)), [MANIFEST, "format 2", "reads format 1"]),
        (other_step, [MANIFEST, "step 77"]),
    ],
)
def test_damage_is_refused_by_name_and_the_newest_intact_checkpoint_offered(root, damage, words):
    tensors = {"table": random_tensor((40, 8), torch.float32)}
    for step in (100, 200, 300):
        save(root, step, tensors, max_file_bytes=512)
    folder = Path(root.path) / "step-00000200"
    damage(folder)
    flip_data(Path(root.path) / "step-00000300")
    with pytest.raises(CheckpointError) as caught:
        open_step(root, 200).verify()
    for word in [*words, "The newest intact one is step-00000100."]:
        assert word in str(caught.value)
    with pytest.raises(CheckpointError):
        load(open_step(root, 200))
    told = []
    assert newest_intact(root, told.append).step == 100
    assert any("step-00000300" in message for message in told)


def test_no_flipped_bit_of_a_manifest_goes_unseen(root):
    save(root, 1, {"x": torch.ones(2)}, state={"lr": 1e-05, "e": 1.5e300})
    path = Path(root.path) / "step-00000001" / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                open_step(root, 1)


def test_nothing_is_copied_from_a_damaged_file(root):
    save(root, 1, {"table": torch.ones(40, 8)}, max_file_bytes=512)
    folder = Path(root.path) / "step-00000001"
    checkpoint = open_step(root, 1)
    flip_data(folder)
    damaged = next(
        piece for piece in json.loads((folder / "manifest.json").read_bytes())["pieces"] if "00001." in piece["file"]
    )
    target = torch.zeros(damaged["shape"])
    with pytest.raises(CheckpointError, match="There is no intact one beside it"):
        checkpoint.read_into([("table", tuple(damaged["offset"]), target)])
    assert not target.any()


def test_of_several_damaged_files_the_first_is_named(root, monkeypatch):
    save(root, 1, {"table": torch.ones(40, 8)}, max_file_bytes=512)
    original, later = Location.read_bytes, threading.Event()

    def read(self):
        content = original(self)
        if not self.name.endswith(".safetensors"):
            return content
        if "-00000." in self.name:
            assert later.wait(30), "the next file is read meanwhile"
        later.set()
        return content[:-1] + bytes([content[-1] ^ 1])

    monkeypatch.setattr(Location, "read_bytes", read)
    checkpoint = open_step(root, 1)
    assert "-00000.safetensors is damaged" in checkpoint.find_damage()


def test_no_more_files_are_read_ahead_than_are_to_be_in_memory(root, monkeypatch):
    save(root, 1, {"table": torch.ones(80, 8)}, max_file_bytes=512)
    read, original = [], Location.read_bytes
    monkeypatch.setattr(Location, "read_bytes", lambda self: (read.append(self.name), original(self))[1])
    blocks = open_step(root, 1).blocks("table")
    read.clear()
    next(blocks)
    blocks.close()
    assert 1 <= len(read) <= 1 + files_at_once(root) < len(step_folder(root, 1).list_names()) - 1


def test_no_more_files_are_made_than_are_to_be_in_memory(root, monkeypatch):
    gate, arrived, made, original = threading.Event(), threading.Semaphore(0), [], Location.write_bytes_atomically

    def write(self, data):
        arrived.release()
        assert gate.wait(30)
        original(self, data)

    def pieces():
        for number in range(9):
            made.append(number)
            yield whole(f"x{number}", torch.full((60,), float(number)))

    monkeypatch.setattr(Location, "write_bytes_atomically", write)
    with Checkpointer(root, 0, 1, "1", mode="blocking", max_file_bytes=512) as checkpointer:
        saving = threading.Thread(target=checkpointer.save, args=(1, pieces, {}))
        saving.start()
        for _ in range(files_at_once(root)):
            assert arrived.acquire(timeout=30), "files are written at the same time"
        time.sleep(0.2)  # what would be made too early is made by then
        assert 9 + files_at_once(root) <= len(made) <= 9 + files_at_once(root) + 2, (
            "after their sizes, the next file, and one"
        )
        gate.set()
        saving.join(30)
    assert_holds(open_step(root, 1), {f"x{number}": torch.full((60,), float(number)) for number in range(9)})


def test_only_the_files_that_are_needed_are_read_each_once(root, monkeypatch):
    save(root, 1, {"table": random_tensor((40, 8), torch.float32)}, max_file_bytes=512)
    read = []
    original = Location.read_bytes
    monkeypatch.setattr(Location, "read_bytes", lambda self: (read.append(self.name), original(self))[1])
    checkpoint = open_step(root, 1)
    read.clear()
    checkpoint.read_into(
        [("table", (0, 0), torch.zeros(1, 4)), ("table", (0, 4), torch.zeros(1, 4)), ("table", (39, 0), torch.zeros(1, 8))]
    )
    assert len(read) == len(set(read)) == 2


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("tables/itm/weight", (0, 0), torch.zeros(4, 2)), ["'tables/itm/weight'", "Did you mean 'tables/item/weight'"]),
        (("tables/item/weight", (0, 0), torch.zeros(4, 2).half()), ["torch.float32", "torch.float16"]),
        (("tables/item/weight", (1, 0), torch.zeros(4, 2)), ["[4, 2]", "[4, 2] at [1, 0]"]),
        (("tables/item/weight", (-1, 0), torch.zeros(4, 2)), ["at [-1, 0]"]),
        (("tables/item/weight", (0,), torch.zeros(4)), ["[4, 2]", "[4] at [0]"]),
        (Piece("tables/item/weight", torch.zeros(2, 2), (0, 0), (3, 2)), ["[4, 2]", "[2, 2] at [0, 0] of [3, 2]"]),
    ],
)
def test_what_a_checkpoint_does_not_hold_is_refused_with_both_sides(root, wanted, words):
    save(root, 1, {"tables/item/weight": torch.ones(4, 2)})
    first = torch.zeros(4, 2)
    with pytest.raises(CheckpointError) as caught:
        open_step(root, 1).read_into([("tables/item/weight", (0, 0), first), wanted])
    for word in ["step-00000001", *words]:
        assert word in str(caught.value)
    assert not first.any(), "nothing is filled if something cannot be"


def test_checkpoints_that_are_not_there_are_told_apart(root):
    assert find_steps(root) == []
    assert newest_intact(root) is None
    with pytest.raises(CheckpointError, match=r"step-00000005 is not there. There is no intact one beside it"):
        open_step(root, 5)
    save(root, 100_000_000, {"x": torch.ones(1)})
    save(root, 5, {"x": torch.ones(1)})
    assert find_steps(root) == [5, 100_000_000]
    assert offer(step_folder(root, 5)) == "The newest intact one is step-100000000."
    assert open_checkpoint(root.join("step-00000005")).step == 5
    for step in (5, 100_000_000):
        (file,) = files_of(Path(step_folder(root, step).path))
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has 2 checkpoints and none is intact. The newest: .*step-100000000"):
        newest_intact(root)
    assert newest_intact(root, verify=False).step == 100_000_000


def test_a_copy_of_a_checkpoint_under_another_name_opens(root):
    save(root, 5, {"x": torch.ones(1)})
    os.rename(step_folder(root, 5).path, root.join("best").path)
    open_checkpoint(root.join("best")).verify()


# ---------------------------------------------------------------------------------------------------------------- writing
def test_a_background_save_keeps_what_was_there_when_it_was_called(root, monkeypatch):
    gate = threading.Event()
    original = Location.write_bytes_atomically

    def write(self, data):
        assert gate.wait(30)
        original(self, data)

    monkeypatch.setattr(Location, "write_bytes_atomically", write)
    tensor, state = torch.arange(1000.0), {"list": [1]}
    with Checkpointer(root, 0, 1, "1", mode="background") as checkpointer:
        checkpointer.save(1, lambda: [whole("x", tensor)], state)
        tensor.fill_(-1)
        state["list"].append(2)
        assert find_steps(root) == []
        gate.set()
    assert_holds(open_step(root, 1), {"x": torch.arange(1000.0)})
    assert open_step(root, 1).state == {"list": [1]}


def test_one_save_is_in_flight_and_the_next_one_waits(root, monkeypatch):
    running, most = [], []
    original = Location.write_bytes_atomically

    def write(self, data):
        running.append(threading.current_thread())
        most.append(len(set(running)))
        original(self, data)
        running.remove(threading.current_thread())

    monkeypatch.setattr(Location, "write_bytes_atomically", write)
    with Checkpointer(root, 0, 1, "1", mode="background") as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, [whole("x", torch.full((100,), float(step)))], {})
            assert find_steps(root)[: step - 1] == list(range(1, step))
    assert max(most) == 1
    assert find_steps(root) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "call",
    [
        Checkpointer.wait,
        Checkpointer.close,
        lambda checkpointer: checkpointer.save(2, [whole("x", torch.ones(1))], {}),
        lambda checkpointer: checkpointer.__exit__(None, None, None),
    ],
    ids=["wait", "close", "save", "leave"],
)
def test_an_error_in_the_background_is_raised_by_the_next_call_once(root, monkeypatch, call):
    def fail(self, data):
        raise PermissionError(13, "Permission denied")

    checkpointer = Checkpointer(root, 0, 1, "1", mode="background")
    with monkeypatch.context() as patch:
        patch.setattr(Location, "write_bytes_atomically", fail)
        checkpointer.save(1, [whole("x", torch.ones(1))], {})
        with pytest.raises(CheckpointError, match=r"step-00000001 cannot be saved: .*Permission denied"):
            call(checkpointer)
    checkpointer.save(3, [whole("x", torch.ones(1))], {})
    checkpointer.close()
    assert find_steps(root) == [3]


def test_an_error_in_the_background_is_told_beside_the_one_that_ends_the_run(root, monkeypatch):
    def fail(self, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Location, "write_bytes_atomically", fail)
    checkpointer = Checkpointer(root, 0, 1, "1", mode="background")

    def train():
        with checkpointer:
            checkpointer.save(1, [whole("x", torch.ones(1))], {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert "Permission denied" in caught.value.__notes__[0]


def test_auto_goes_to_the_background_if_the_copy_fits_and_says_why(root):
    for memory_bytes, words in (
        (400, ["background:", "400 bytes fits"]),
        (399, ["blocking, piece by piece:", "does not fit"]),
    ):
        with Checkpointer(root, 0, 1, "1", mode="auto", memory_bytes=memory_bytes) as checkpointer:
            checkpointer.save(memory_bytes, [whole("x", torch.ones(100))], {})
            for word in words:
                assert word in checkpointer.decision
    assert find_steps(root) == [399, 400]


def test_a_dtype_that_cannot_be_kept_is_refused_before_anything_is_committed(root):
    with pytest.raises(CheckpointError, match=r"'x' is torch.complex128.*float32"):
        save(root, 1, {"x": torch.ones(1, dtype=torch.complex128)})
    assert root.list_names() == []


def test_ranks_whose_pieces_leave_a_gap_commit_nothing(root):
    checkpointer = Checkpointer(root, 0, 1, "1", mode="blocking")
    with pytest.raises(CheckpointError, match=r"is not committed: .*'x'.*2 of 4 elements are in none"):
        checkpointer.save(1, [Piece("x", torch.ones(2), (0,), (4,))], {})
    assert find_steps(root) == []


def test_a_rank_that_never_comes_is_named_and_nothing_is_committed(root):
    for options in ({"timeout_s": 0.0}, {"is_aborted": lambda: True}):
        checkpointer = Checkpointer(root, 0, 3, "1", mode="blocking", **options)
        with pytest.raises(PeerError, match=r"not committed: after .* rank 1, 2 of 3 has not done its share"):
            checkpointer.save(1, [whole("x", torch.ones(1))], {})
    assert find_steps(root) == []


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_tells_the_others_at_once(any_root, failing):
    ranks = [Checkpointer(any_root, rank, 3, "1", mode="background", timeout_s=30) for rank in range(3)]
    for rank, checkpointer in enumerate(ranks):
        dtype = torch.complex128 if rank == failing else torch.float32
        checkpointer.save(1, [whole(f"x{rank}", torch.ones(1, dtype=dtype))], {})
    for rank, checkpointer in enumerate(ranks):
        error, words = (
            (CheckpointError, "^'x") if rank == failing else (PeerError, rf"rank {failing} failed: |rank 0 failed: ")
        )
        with pytest.raises(error, match=words):
            checkpointer.wait()
    assert find_steps(any_root) == []


def test_a_torn_save_of_the_same_step_is_replaced_and_its_files_removed(root):
    folder = step_folder(root, 7)
    folder.make_dirs()
    for name in ("1-r00000-00000.safetensors", "1-r00001.json", "1-r00003.failed", ".1-r00000-00001.safetensors.ab.part"):
        folder.join(name).write_text_atomically("torn")
    folder.join("3-r00000-00000.safetensors").write_text_atomically("of an attempt that is still to commit")
    save(root, 7, {"x": torch.ones(3)}, attempt="2")
    assert folder.list_names() == ["2-r00000-00000.safetensors", "3-r00000-00000.safetensors", "manifest.json"]
    assert_holds(open_step(root, 7), {"x": torch.ones(3)})


def test_a_later_attempt_replaces_a_damaged_checkpoint_and_an_earlier_one_is_refused(root):
    save(root, 7, {"x": torch.ones(3)}, attempt="0009")
    flip_data_file = files_of(Path(step_folder(root, 7).path))[0]
    flip_data_file.write_bytes(b"damaged")
    save(root, 7, {"x": torch.ones(3)}, attempt="0010")
    assert_holds(open_step(root, 7), {"x": torch.ones(3)})
    assert step_folder(root, 7).list_names() == ["0010-r00000-00000.safetensors", "manifest.json"]
    with pytest.raises(CheckpointError, match=r"saved by attempt 10 of this run, and this is attempt 0009"):
        save(root, 7, {"x": torch.ones(3)}, attempt="0009")
    assert_holds(open_step(root, 7), {"x": torch.ones(3)})


def test_a_step_is_committed_once_an_attempt(root):
    save(root, 7, {"x": torch.ones(3)})
    before = (Path(step_folder(root, 7).path) / "manifest.json").stat()
    save(root, 7, {"x": torch.ones(3)})
    after = (Path(step_folder(root, 7).path) / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


# ------------------------------------------------------------------------------------------------------------------ disks
def fail_from(number):
    """A disk that is full from its nth write on."""
    original, writes = Location.write_bytes_atomically, []

    def write(self, data):
        writes.append(self.name)
        if len(writes) >= number:
            raise OSError(28, "No space left on device")
        original(self, data)

    return write


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("mode", ["blocking", "background"])
def test_a_full_disk_is_said_plainly_and_leaves_earlier_checkpoints_alone(root, monkeypatch, number, mode):
    tensors = {"table": random_tensor((40, 8), torch.float32)}
    save(root, 1, tensors, max_file_bytes=512)
    assert len(step_folder(root, 1).list_names()) == 5, "four files, so with list and manifest six writes"
    with monkeypatch.context() as patch:
        patch.setattr(Location, "write_bytes_atomically", fail_from(number))
        with pytest.raises(CheckpointError) as caught:
            save(root, 2, tensors, max_file_bytes=512, mode=mode)
    for word in [
        "step-00000002 cannot be saved",
        "the disk is full",
        "1,280 bytes",
        "bytes are free",
        "Earlier checkpoints are",
    ]:
        assert word in str(caught.value)
    assert root.list_names() == ["step-00000001"], "the torn folder takes no space"
    assert_holds(newest_intact(root), tensors)


def test_a_real_small_disk_that_fills_up(tmp_path):
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], check=False, capture_output=True, timeout=20
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        root = locate(str(tmp_path / "checkpoints"))
        save(root, 1, {"x": torch.ones(10_000)}, max_file_bytes=16_384)
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be saved: the disk is full.*160,000 bytes"):
            save(root, 2, {"x": torch.ones(40_000)}, max_file_bytes=16_384)
        assert root.list_names() == ["step-00000001"]
        assert_holds(newest_intact(root), {"x": torch.ones(10_000)})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=20)


KILLED = """
    import os, random, signal, sys, time
    import torch
    from embedshard.storage import locate
    from embedshard.train.checkpoint import Checkpointer, Piece, newest_intact

    torch.set_num_threads(1)
    root, draw = locate(sys.argv[1]), random.Random(5)

    def content(step):
        return torch.arange(2000.0) + step

    def save_for_ever(attempt, mode, pipe):
        newest = newest_intact(root)
        step = 1 if newest is None else newest.step + 1
        checkpointer = Checkpointer(root, 0, 1, str(attempt), mode=mode, max_file_bytes=2048)
        while True:
            checkpointer.save(step, [Piece("x", content(step), (0,), (2000,))], {"step": step}, keep=2)
            if mode == "background":
                checkpointer.wait()
            os.write(pipe, b"%d " % step)
            step += 1

    newest_told = 0
    for attempt in range(1, 21):
        told, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(attempt, ("blocking", "background")[attempt % 2], pipe)
        os.close(pipe)
        first = os.read(told, 100)  # it has begun, and what it tells is committed
        time.sleep(draw.random() * 0.04)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest_told = int((first + os.read(told, 100_000)).split()[-1])
        damage = []
        checkpoint = newest_intact(root, damage.append)
        found = torch.zeros(2000)
        checkpoint.read_into([("x", (0,), found)])
        assert not damage, damage
        assert checkpoint.step in (newest_told, newest_told + 1), (checkpoint.step, newest_told)
        assert torch.equal(found, content(checkpoint.step)) and checkpoint.state == {"step": checkpoint.step}
    print("survived", newest_told)
"""


def test_kill_9_at_any_moment_of_a_save_leaves_the_earlier_checkpoint(root):
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), root.path], capture_output=True, text=True, timeout=55, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("survived")


# ---------------------------------------------------------------------------------------------------------------- pruning
def test_prune_keeps_the_newest_and_the_protected_and_removes_older_torn_saves(any_root):
    for step in (1, 2, 3, 4, 5):
        save(any_root, step, {"x": torch.ones(2)})
    for step in (2, 6):
        step_folder(any_root, step).join("manifest.json").delete_file()
    any_root.join("notes").make_dirs()
    step_folder(any_root, 6).make_dirs()
    prune(any_root, keep=2, protect={1, 2})
    expected = ["notes", "step-00000001", "step-00000004", "step-00000005", "step-00000006"]
    assert any_root.list_names() == expected
    prune(any_root, keep=2, protect={1})
    assert any_root.list_names() == expected
    prune(any_root, keep=1, newest=4)
    assert any_root.list_names() == ["notes", "step-00000004", "step-00000005", "step-00000006"]


def test_a_run_that_went_back_does_not_take_a_damaged_later_checkpoint_for_its_newest(root):
    for step in (10, 20):
        save(root, step, {"x": torch.ones(2)}, attempt="1")
    files_of(Path(step_folder(root, 20).path))[0].write_bytes(b"damaged")
    assert newest_intact(root).step == 10
    save(root, 15, {"x": torch.ones(2)}, attempt="2", keep=1)
    assert newest_intact(root).step == 15
    save(root, 20, {"x": torch.ones(2)}, attempt="2", keep=1)
    assert newest_intact(root).step == 20
    assert root.list_names() == ["step-00000020"]


def test_a_checkpoint_without_its_manifest_is_none_while_it_is_pruned(root, monkeypatch):
    for step in (1, 2):
        save(root, step, {"x": torch.ones(2)})

    def fail(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Location, "delete_tree", fail)
    with pytest.raises(CheckpointError, match=r"step-00000001 is an old checkpoint and cannot be deleted"):
        prune(root, keep=1)
    assert find_steps(root) == [2]
