"""Workers of one machine exchange tensors through memory that they share: what gloo would give, and errors in time."""

import json
import textwrap

import pytest

from embedshard.errors import ConfigError
from embedshard.neighbours import SHARE_MEMORY, as_neighbours
from tests.commands import start_python

START = """
    import json, os, sys, time
    from datetime import timedelta
    import torch, torch.distributed as dist
    from embedshard import shared_memory
    from embedshard.neighbours import Neighbours, as_neighbours

    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    gloo = dist.group.WORLD
"""

END = """
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump(told, file)
    dist.barrier()
    os._exit(0)  # a thread of gloo that wants the interpreter while that ends would abort it
"""

COLLECTIVES = """
    import random
    group = as_neighbours(gloo, {}, timedelta(seconds=60))
    assert isinstance(group, Neighbours), group
    if size == 3:
        # Memory goes back to the kernel, and is taken again.
        shared_memory._KEPT_BYTES, shared_memory._IDLE_MESSAGES = 2**16, 3
    draws, told = random.Random(5), {"waits": 0}
    dtypes = [torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.float16, torch.bool]

    def drawn(shape, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 2 if dtype == torch.bool else 50, shape, generator=generator)
        return numbers.to(dtype)

    def step(number):
        # Returns what to wait for, and a check of what is there afterwards; all ranks draw alike.
        kind = draws.choice(["all_to_all", "even", "all_gather", "into", "sum", "most", "scatter", "scatter_list", "object"])
        dtype, width = draws.choice(dtypes), draws.choice([0, 1, 3, 64, 5000])
        seed = number * 100
        if kind == "all_to_all":
            sizes = [[draws.choice([0, 1, 2, 17]) for _ in range(size)] for _ in range(size)]  # of each, to each
            whole = [drawn((sum(sizes[r]), width), dtype, seed + r) for r in range(size)]
            output = torch.zeros(sum(sizes[r][rank] for r in range(size)), width, dtype=dtype)
            work = dist.all_to_all_single(
                output, whole[rank], [sizes[r][rank] for r in range(size)], sizes[rank], group=group, async_op=True
            )
            wanted = torch.cat([torch.split(whole[r], sizes[r])[rank] for r in range(size)])
            return work, lambda: torch.equal(output, wanted)
        if kind == "even":
            whole = [drawn((size * 4, width), dtype, seed + r) for r in range(size)]
            output = torch.zeros_like(whole[0])
            work = dist.all_to_all_single(output, whole[rank], group=group, async_op=True)
            return work, lambda: torch.equal(output, torch.cat([whole[r].chunk(size)[rank] for r in range(size)]))
        if kind in ("all_gather", "into"):
            whole = [drawn((5, width), dtype, seed + r) for r in range(size)]
            outputs = [torch.zeros_like(whole[0]) for _ in range(size)]
            if kind == "into":
                output = torch.zeros(size * 5, width, dtype=dtype)
                work = dist.all_gather_into_tensor(output, whole[rank], group=group, async_op=True)
                return work, lambda: torch.equal(output, torch.cat(whole))
            work = dist.all_gather(outputs, whole[rank], group=group, async_op=True)
            return work, lambda: all(torch.equal(a, b) for a, b in zip(outputs, whole))
        if kind in ("sum", "most"):
            kinds = [torch.float32, torch.float64, torch.int64]
            whole = [drawn((7, width), kinds[number % 3], seed + r) / 3 for r in range(size)]
            mine = whole[rank].clone()
            op = dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX
            work = dist.all_reduce(mine, op=op, group=group, async_op=True)
            wanted = whole[0].clone()
            for other in whole[1:]:
                wanted = wanted + other if kind == "sum" else torch.maximum(wanted, other)
            return work, lambda: torch.equal(mine, wanted)
        if kind in ("scatter", "scatter_list"):
            whole = [drawn((size * 3, width), torch.float32, seed + r) / 3 for r in range(size)]
            output = torch.zeros(3, width)
            if kind == "scatter":
                work = dist.reduce_scatter_tensor(output, whole[rank], group=group, async_op=True)
            else:
                work = dist.reduce_scatter(output, list(whole[rank].chunk(size)), group=group, async_op=True)
            wanted = whole[0].chunk(size)[rank].clone()
            for other in whole[1:]:
                wanted += other.chunk(size)[rank]
            return work, lambda: torch.equal(output, wanted)
        values = [None] * size
        dist.all_gather_object(values, {"rank": rank, "number": number}, group=group)
        return None, lambda: values == [{"rank": r, "number": number} for r in range(size)]

    open_ones = []
    for number in range(400):
        open_ones.append(step(number))
        # Some are waited for at once, some late and in another order, differently on each rank.
        own = random.Random(number * 7 + rank)
        while open_ones and own.random() < 0.7:
            work, is_right = open_ones.pop(own.randrange(len(open_ones)))
            if work is not None:
                work.wait()
                told["waits"] += 1
            assert is_right(), number
        if own.random() < 0.02:
            time.sleep(0.02)
    for work, is_right in open_ones:
        if work is not None:
            work.wait()
        assert is_right()
    # Many at once: more than the table of messages holds.
    many = [torch.full((3,), float(rank + number)) for number in range(700)]
    works = [dist.all_reduce(one, group=group, async_op=True) for one in many]
    for work in reversed(works):
        work.wait()
    assert all(one.tolist() == [size * number + size * (size - 1) / 2] * 3 for number, one in enumerate(many))
    large = torch.full((300_000,), float(rank))
    dist.all_reduce(large, group=group)
    assert bool((large == size * (size - 1) / 2).all())
    for _ in range(shared_memory._IDLE_MESSAGES + 300 if size == 3 else 0):
        dist.all_reduce(torch.ones(1), group=group)
    # A gradient goes through torch's own functional collectives.
    from embedshard.world import World
    weight = torch.ones(2, requires_grad=True)
    gathered = World(rank, size, rank, size, torch.device("cpu"), group).gather(weight * (rank + 1))
    (gathered * torch.ones(2 * size)).sum().backward()
    told["gradient"] = weight.grad.tolist()
    told["backend"] = str(dist.get_backend(group))
    told["memory"] = group._post._memory_bytes
    told["files"] = sorted({os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                            if os.path.exists(f"/proc/self/fd/{fd}") and "memfd" in os.readlink(f"/proc/self/fd/{fd}")})
"""


def run_ranks(size, program, folder, wait_s=120):
    """Runs a program on ranks; returns what each told."""
    text = textwrap.dedent(START) + textwrap.dedent(program) + textwrap.dedent(END)
    (folder / "program.py").write_text(text)
    ranks = [start_python(folder / "program.py", rank, size, folder) for rank in range(size)]
    try:
        codes = [rank.communicate(wait_s)[1][-3000:] * (rank.returncode != 0) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(codes), "\n".join(codes)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_collectives_give_what_they_should_in_any_order_of_waiting(size, tmp_path):
    told = run_ranks(size, COLLECTIVES, tmp_path)
    assert len(told) == size
    assert [one["gradient"] for one in told] == [[(rank + 1.0) * size] * 2 for rank in range(size)]
    assert {one["backend"] for one in told} == {"neighbours"}
    assert min(one["waits"] for one in told) > 100
    if size == 3:
        assert {one["memory"] for one in told} == {2**16}
    assert all(len(one["files"]) == 1 for one in told), "the others' files are closed once they are mapped"


ENDED = """
    group = as_neighbours(gloo, {}, timedelta(seconds=4))
    told = {}
    dist.all_reduce(torch.ones(3), group=group)
    if rank == 1:
        CASE
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(3), group=group)
    except RuntimeError as error:
        told = {"error": str(error), "kind": type(error).__name__, "seconds": time.monotonic() - begin}
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump(told, file)
    os._exit(0)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("os.kill(os.getpid(), 9)", "Connection closed by peer: rank 1 of this machine has ended."),
        ("time.sleep(30)", "Timed out waiting 4 s for rank 1 of this machine, which has not ended."),
        (
            "dist.all_reduce(torch.ones(4), group=group); os._exit(0)",
            "rank 1 sent 16 bytes where 12 were expected: not all ranks do the same.",
        ),
    ],
)
def test_a_rank_that_does_not_do_its_part_is_told_of(case, says, tmp_path):
    from embedshard.world import _says_that_a_peer_is_gone

    text = textwrap.dedent(START) + textwrap.dedent(ENDED).replace("CASE", case)
    (tmp_path / "program.py").write_text(text)
    ranks = [start_python(tmp_path / "program.py", rank, 2, tmp_path) for rank in range(2)]
    try:
        assert ranks[0].wait(60) == 0, ranks[0].communicate()[1]
    finally:
        for rank in ranks:
            rank.kill()
    told = json.loads((tmp_path / "rank-0.json").read_text())
    assert told["error"] == says
    if "sent" not in says:
        assert _says_that_a_peer_is_gone(RuntimeError(told["error"]))


REASONS = """
    import logging
    class Kept(logging.Handler):
        def emit(self, record):
            told["said"].append(record.getMessage())
    told = {"said": []}
    logging.getLogger("embedshard.neighbours").setLevel(logging.INFO)
    logging.getLogger("embedshard.neighbours").addHandler(Kept())
    environment = {"EMBEDSHARD_SHARE_MEMORY": "0"} if rank == 1 and "CASE" == "one wishes not" else {}
    if "CASE" == "machines":
        shared_memory._place = lambda: (f"boot {rank}", "pid")
    def no_file(*_):
        raise OSError(38, "no memfd here")
    if "CASE" == "closed" and rank == 1:
        shared_memory.os.memfd_create = no_file
    if "CASE" == "other" and rank == 0:
        shared_memory.Segment.token = property(shared_memory.Segment.token.fget, lambda segment, token: None)
    group = as_neighbours(gloo, environment, timedelta(seconds=60))
    total = torch.ones(2)
    dist.all_reduce(total, group=group)
    told["is_gloo"] = group is gloo and total.tolist() == [2, 2]
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("one wishes not", []),
        ("machines", ["they are not all on one machine"]),
        ("closed", ["rank 1: [Errno 38] no memfd here"]),
        ("other", ["rank 1: [Errno 6] it is the memory of another run"]),
    ],
)
def test_ranks_that_cannot_share_memory_agree_to_stay_with_gloo(case, says, tmp_path):
    for one in run_ranks(2, REASONS.replace("CASE", case), tmp_path):
        assert one["is_gloo"]
        assert len(one["said"]) == len(says)
        for said, wanted in zip(one["said"], says, strict=True):
            assert said.startswith(f"Workers exchange vectors by gloo and share no memory: {wanted}")


MEMORY = """
    group = as_neighbours(gloo, {}, timedelta(seconds=60))
    fallocate = os.posix_fallocate
    def full(*_):
        raise OSError(28, "No space left on device")
    shared_memory.os.posix_fallocate = full
    told = {}
    try:
        dist.all_reduce(torch.ones(2_000_000), group=group)
    except MemoryError as error:
        told["error"] = str(error)
"""


@pytest.mark.timeout(120)
def test_memory_that_is_not_there_is_an_error_before_it_is_written_to(tmp_path):
    for rank, one in enumerate(run_ranks(2, MEMORY, tmp_path)):
        assert one["error"] == (
            f"rank {rank} needs 8,003,584 bytes of memory that it shares with the other workers of this machine, for what "
            "it sends them, and the system gives none: No space left on device. Give it more memory, or train smaller "
            "batches."
        )


def test_a_wish_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match=r"EMBEDSHARD_SHARE_MEMORY is 'yes'\. It must be 1"):
        as_neighbours(None, {SHARE_MEMORY: "yes"}, None)
