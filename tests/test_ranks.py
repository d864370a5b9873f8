"""Training over ranks: two gloo processes on the CPU against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command_helpers import invoke
from ranks_helpers import load, on_ranks, save
from run_helpers import metrics
from safetensors.torch import load_file
from torch import Tensor, nn

import tetdeploy
from tetdeploy.checkpoint import read_metadata
from tetdeploy.data import load_data, save_npz, split_validation
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.storage.tensor_file import read_content
from tetdeploy.train import How, TrainConfig, device, loop, train, train_seeds
from tetdeploy.train import ranks as ranks_module
from tetdeploy.train.ranks import Ranks, current_ranks, process_group
from tetdeploy.train.runs import only_trainer
from tetdeploy.train.synchronised import over_ranks

DIGITS = load_data("digits", "train", data_dir=Path("data"))
TRAIN, VAL = (
    part.select(range(count)) for part, count in zip(split_validation(DIGITS, fraction=0.2), (200, 51), strict=True)
)
SHORT = TrainConfig(T=2, epochs=1, batch_size=50)
QAT = TrainConfig(T=2, epochs=1, batch_size=100, qat=True)
_SECONDS = 180  # far more than it takes; a hang is to fail
OWN = TrainConfig(tit="1:1,2:1", batch_size=50)
CONFIG = TrainConfig(T=3, epochs=2, batch_size=32, augment="shift", ema=0.9, random_T="1:3", clip=1.0)


def classifier(seed: int = 0) -> Classifier:
    """In float64, where rounding moves no current over the threshold: spikes make float32 runs drift apart."""
    torch.manual_seed(seed)
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.25)
    data = {"mean": DIGITS.mean, "std": DIGITS.std, "class_names": DIGITS.class_names, "data": "digits"}
    return Classifier(build_network(config), config=config, **data).double()


class Own(nn.Module):
    """A network with a layer that no pass needs, a gain that a single step does not need, and a last block that, when
    recomputed, runs its BN a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.unused = classifier().network, nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(10))
        self.last = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.network(x, T)
        logits = self.last(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
        return logits if T == 1 else logits * self.gain


def own(seeds: list[int]) -> Classifier:
    """Notes the seed of whatever is drawn in each of its training passes, such as dropout."""

    def note(module: nn.Module, *_: Any) -> None:
        if module.training:
            seeds.append(torch.initial_seed())

    made = classifier()
    made.network, made.config = Own(), replace(made.config, model="tests:own")
    made.register_forward_pre_hook(note)
    return made.double()


def said_once(match: str, error: type[BaseException] = ValueError) -> AbstractContextManager[Any]:
    """What is wrong for all is raised by the first process alone."""
    if current_ranks().writes:
        return pytest.raises(error, match=match)
    return pytest.raises(ConnectionError, match="the first process of a machine failed")


def interrupt_one(out: Path, *, training: bool) -> None:
    """Ctrl-C reaches the second process alone, in its first pass of training or validation; the first saves slowly."""
    ranks, cut = current_ranks(), classifier()

    def interrupt(network: nn.Module, _: Any) -> None:
        if network.training == training:
            hook.remove()
            signal.raise_signal(signal.SIGINT)

    def slowly(*state: Any) -> None:
        time.sleep(0.5)
        save_state(*state)

    save_state, hook = loop.save_state, cut.register_forward_pre_hook(interrupt)
    if ranks.rank == 0:
        hook.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", slowly)
        assert train(cut, TRAIN, VAL, SHORT, out, progress=False).interrupted
    assert read_content(out / "last.safetensors")["resume"]["step"] == (1 if training else 4)


def _work(folder: Path) -> None:
    """What the tests below look at, in one group of two processes: starting one takes seconds."""
    ranks = current_ranks()
    result = train(classifier(), TRAIN, VAL, CONFIG, folder / "two", runs=folder)
    drawn: list[int] = []
    train(own(drawn), TRAIN, VAL, OWN, folder / "own", how=How(recompute=True))
    train(tetdeploy.load(folder / "two"), TRAIN, VAL, QAT, folder / "qat", progress=False)
    seeds = train_seeds(classifier, TRAIN, VAL, SHORT, (3, 4), folder / "seeds", progress=False)
    again = train_seeds(classifier, TRAIN, VAL, SHORT, (3, 4), folder / "seeds", resume=True, progress=False)
    interrupt_one(folder / "cut", training=True)
    interrupt_one(folder / "validated", training=False)
    with said_once(r"33 images has no 2 equal shares.*multiple of 2, of at most 200"):
        train(classifier(), TRAIN, VAL, replace(SHORT, batch_size=33), folder / "odd")
    with only_trainer(folder / "held", resume=False), said_once("held is being trained by process"):
        train(classifier(), TRAIN, VAL, CONFIG, folder / "held")
    with said_once("is of a run with other settings: training"):
        train(classifier(), TRAIN, VAL, SHORT, folder / "other", restart_from=folder / "two")
    with said_once("nothing does not exist", FileNotFoundError):
        train(classifier(), TRAIN, VAL, SHORT, folder / "other", restart_from=folder / "nothing")
    with said_once("seeds already holds a run"):
        train_seeds(classifier, TRAIN, VAL, SHORT, (3, 4), folder / "seeds", progress=False)
    with pytest.raises(ValueError, match="1 validation images are too few for 2 processes"):
        train(classifier(), TRAIN, VAL.select(range(1)), SHORT, folder / "few", progress=False)
    with pytest.raises(ValueError, match="cuda:0 is one GPU for 2 processes"):
        train(classifier(), TRAIN, VAL, replace(SHORT, device="cuda:0"), folder / "gpu")
    with said_once("^$", KeyboardInterrupt), ranks.first():
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tetdeploy.train.ranks.process_group", lambda: nullcontext(ranks))  # the one that is there
        refused = invoke("train", "--data", "no-such-set", "--runs", folder / "none")
    with ranks.first():
        first = (folder / "first").exists()
        (folder / "first").touch()
    save(
        folder,
        ranks.rank,
        epochs=[run.epochs for run in (result, *seeds.runs, *again.runs)],
        best=result.best and result.best.val_accuracy,
        any=[ranks.any(ranks.rank == 1), ranks.any(False)],
        agreed=ranks.agreed(f"from {ranks.rank}"),
        after_another=first,
        seeds=drawn,
        refused=(refused.exit_code, refused.output),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    on_ranks(2, _work, made)
    return made


def test_two_ranks_train_like_one_process(folder: Path, tmp_path: Path) -> None:
    train(classifier(), TRAIN, VAL, CONFIG, tmp_path, progress=False)
    assert load(folder, 0)["epochs"] == [2, 1, 1, 1, 1]
    for one, two in zip(metrics(tmp_path), metrics(folder / "two"), strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_sdt_loss", "val_accuracy", "lr"):
            assert two[name] == pytest.approx(one[name], rel=1e-6), name  # the sums of losses are float32


def test_two_ranks_train_in_8_bits_like_one_process(folder: Path, tmp_path: Path) -> None:
    train(tetdeploy.load(folder / "two"), TRAIN, VAL, QAT, tmp_path, progress=False)
    (one,), (two,) = metrics(tmp_path), metrics(folder / "qat")
    for name in ("train_loss", "val_loss"):  # without the 8 bits they are 1 % and 0.1 % off
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert read_metadata(folder / "qat")["int8"] == read_metadata(tmp_path)["int8"]


def test_two_ranks_leave_parameters_out_like_one_process(folder: Path, tmp_path: Path) -> None:
    """Those that a step does not use: they get no gradient, and so no decay either. The two recompute their blocks."""
    drawn: list[int] = []
    train(own(drawn), TRAIN, VAL, OWN, tmp_path, progress=False)
    one, two = (load_file(run / "last.safetensors") for run in (tmp_path, folder / "own"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-7, msg=name)
    start = Own().double()
    assert torch.equal(two["network.unused.weight"], start.unused.weight)
    assert not torch.equal(two["network.gain"], start.gain)
    seeds = [load(folder, rank)["seeds"] for rank in (0, 1)]
    assert seeds[0] == drawn and len(drawn) == 2 * 4
    assert len({*seeds[0], *seeds[1]}) == len(seeds[0] + seeds[1])  # no two shares have the same dropout


def test_one_rank_writes_and_all_know_the_same(folder: Path) -> None:
    one, two = load(folder, 0), load(folder, 1)
    assert (one.pop("after_another"), two.pop("after_another")) == (False, True)
    assert one.pop("seeds") != two.pop("seeds")
    del one["refused"], two["refused"]
    assert one == two and one["any"] == [True, False] and one["agreed"] == "from 0"
    files = ["checkpoint.safetensors", "config.json", "last.safetensors", "metrics.jsonl"]
    assert sorted(path.name for path in (folder / "two").iterdir()) == files
    assert json.loads((folder / "seeds" / "summary.json").read_text())["num_finished"] == 2
    assert not (folder / "odd").exists()


def test_the_command_says_once_what_is_wrong_for_all(folder: Path) -> None:
    (code, said), other = (load(folder, rank)["refused"] for rank in (0, 1))
    assert code == 1 and said.count("unknown data set 'no-such-set'") == 1
    assert other == (1, "")


def test_a_set_of_fewer_images_than_a_batch_is_named() -> None:
    Ranks(size=2).check_batch(128, 102)
    with pytest.raises(ValueError, match=r"101 images has no 2 equal shares.* a multiple of 2, of at most 101"):
        Ranks(size=2).check_batch(128, 101)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Start]:
    """Starts `torchrun --nproc-per-node 2 -m tetdeploy train ...`, with its output to read; ends what a test leaves."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [*command, "--max-restarts", str(restarts), "-m", "tetdeploy", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes, by force after 30 s
            process.communicate(timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_rank_ends_the_run_and_resume_goes_on(tmp_path: Path, torchrun: Start) -> None:
    run = tmp_path / "run"
    save_npz(TRAIN, tmp_path / "some.npz")  # read without scikit-learn, which takes longer to import than this to train
    small = ("--data", str(tmp_path / "some.npz"), "--batch-size", "50", "--width", "0.25", "--T", "2")
    begun = torchrun(*small, "--epochs", "400", "--out", str(run))
    wait_until(lambda: (run / "metrics.jsonl").is_file(), begun)
    os.kill(workers(begun)[1], signal.SIGKILL)
    output = begun.communicate(timeout=_SECONDS)[0]
    print(output)  # whole, if it is another
    assert begun.returncode != 0 and "another process of this run has ended" in output
    finished = len(metrics(run))
    assert 1 <= finished < 400

    def goes_on() -> bool:
        return len(metrics(run)) > finished

    resumed = torchrun("--resume", str(run), restarts=2)
    for victim in (0, 1):
        wait_until(goes_on, resumed)
        before = [Path(f"/proc/{pid}") for pid in workers(resumed)]
        os.kill(int(before[victim].name), signal.SIGKILL)
        wait_until(lambda gone=before: not any(map(Path.exists, gone)), resumed)  # type: ignore[misc]
        finished = len(metrics(run))
    wait_until(goes_on, resumed)
    resumed.send_signal(signal.SIGINT)
    output = resumed.communicate(timeout=_SECONDS)[0]
    print(output)
    assert f"go on with: tetdeploy train --resume {run}" in output
    assert output.count("epoch 2/400") <= 1  # one process prints
    assert [row["epoch"] for row in metrics(run)] == list(range(1, len(metrics(run)) + 1))


def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group() as ranks, ranks.first():
        assert ranks == Ranks() and ranks.writes and ranks.share(8) == slice(0, 8)
        assert ranks.any(True) and not ranks.any(False) and ranks.agreed("x") == "x"


@pytest.mark.parametrize(("local_rank", "order"), [(0, ["block", "wait"]), (1, ["wait", "block"])])
def test_the_first_of_a_second_machine_goes_before_its_others(
    local_rank: int, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Ranks, "any", lambda ranks, flag: seen.append("wait"))
    with Ranks(rank=2 + local_rank, size=4, local_rank=local_rank).first():
        seen.append("block")
    assert seen == order


def test_ranks_are_not_stopped_apart_in_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, interrupt = [], threading.Event()
    interrupt.set()
    monkeypatch.setattr(loop, "measure", lambda *_, stop, **options: seen.append(stop()))
    for size in (1, 2):
        loop._validate(Mock(config=SHORT, ranks=Ranks(size=size)), Mock(epoch=0), Mock(), interrupt)
    assert seen == [True, False]


def test_one_process_of_all_machines_writes() -> None:
    assert [Ranks(rank, size=4, local_rank=rank % 2).writes for rank in range(4)] == [True, False, False, False]


def test_what_is_agreed_goes_over_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda values, **how: sent.append((values, how)))
    Ranks(size=2).agreed("x")
    assert sent == [(["x"], {"src": 0, "device": torch.device("cpu")})]


def test_an_environment_that_torchrun_did_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ValueError, match="WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        process_group(),
    ):
        pass


@pytest.fixture
def asked(collects_its_own: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of PyTorch by a process that torchrun has started as the second on the second of two machines."""
    names = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    calls: list[Any] = []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda method: iter([(Mock(), 3, 4)]))
    monkeypatch.setattr(ranks_module, "_store_of_attempt", lambda *_: Mock())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **how: calls.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("end"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    return calls


@pytest.mark.parametrize(
    ("gpus", "nccl", "wanted"),
    [
        (0, True, ["gloo", "end"]),
        (2, False, ["gloo", "end"]),
        (2, True, [1, "cpu:gloo,cuda:nccl", "end"]),
        (1, True, ["cpu:gloo,cuda:nccl", "end"]),  # the run refuses that later, and says why
    ],
)
def test_each_process_takes_the_gpu_of_its_number(
    gpus: int, nccl: bool, wanted: list[Any], asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    with process_group():
        pass
    assert asked == wanted


def test_a_group_that_is_there_is_used_with_the_numbers_of_torchrun(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"is_initialized": True, "get_rank": 3, "get_world_size": 4}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with process_group() as ranks:
        assert ranks == Ranks(rank=3, size=4, local_rank=1)
    assert asked == []


def test_cuda_is_there_for_the_processes_of_a_second_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current_ranks", lambda: Ranks(rank=3, size=4, local_rank=1))
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert device.pick_device("cuda") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242", True),
        ("Connection reset by peer", True),
        ("writev: Broken pipe", True),
        ("connect: Connection refused", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_only_what_a_lost_process_causes_is_said_to_be_that(said: str, lost: bool, asked: list[Any]) -> None:
    kind, match = (
        (ConnectionError, "another process of this run has ended") if lost else (RuntimeError, "mat1 and mat2")
    )
    with pytest.raises(kind, match=match), process_group():
        raise RuntimeError(said)
    assert asked == ["gloo", "end"]


def test_processes_started_again_share_nothing_with_those_before() -> None:
    """Each attempt has other ranks than the last; one ends before it has met the others, and leaves its question."""
    kept = torch.distributed.HashStore()
    kept.set_timeout(timedelta(seconds=_SECONDS))
    kept.set("tetdeploy/asked by 2", "of one that has ended")
    for size in (4, 3, 4):
        others_first = reversed(range(size))
        with ThreadPoolExecutor(size) as pool:
            own = list(pool.map(lambda rank, size=size: ranks_module._store_of_attempt(kept, rank, size), others_first))
        assert not any(store.check(["address"]) for store in own)
        own[0].set("address", "a new one")
        assert [store.get("address") for store in own] == [b"a new one"] * size


def test_a_process_that_does_not_come_again_is_named() -> None:
    kept = torch.distributed.HashStore()
    kept.set_timeout(timedelta(seconds=0.1))
    kept.set("tetdeploy/asked by 1", "of one that has ended")
    with pytest.raises(RuntimeError, match=r"process 1 has not come within 0:00:00\.1"):
        ranks_module._store_of_attempt(kept, 0, 2)


def test_processes_that_cannot_reach_each_other(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Gloo connectFullMesh failed with [pair.cc:144] no error\nC++ stack"
    monkeypatch.setattr(torch.distributed, "init_process_group", Mock(side_effect=RuntimeError(said)))
    match = r"cannot reach each other \(Gloo connectFullMesh failed with \[pair.cc:144\] no error\); start them again$"
    with pytest.raises(ConnectionError, match=match), process_group():
        pass
    assert asked == []


def test_what_torchrun_sends_after_a_loss_hides_it_not(asked: list[Any]) -> None:
    """It sees the same end, and this process is on its way out of the batch, or of the group."""

    def leave_batch() -> None:
        try:
            raise RuntimeError("Connection closed by peer")
        finally:
            raise KeyboardInterrupt

    with pytest.raises((ConnectionError, KeyboardInterrupt)) as ended, process_group():
        leave_batch()
    assert "another process of this run has ended" in str(ended.value)
    with pytest.raises(KeyboardInterrupt), process_group():
        raise KeyboardInterrupt
    assert asked == ["gloo", "end"] * 2


def test_a_group_ends_before_an_interrupt(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises((ConnectionError, KeyboardInterrupt)) as ended, process_group():
        raise RuntimeError("Connection closed by peer")
    assert ended.type is ConnectionError


@pytest.mark.usefixtures("collects_its_own")
def test_an_error_does_not_keep_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of its frames hold it, and those that are in a reference cycle."""
    groups: list[weakref.ref[Any]] = []

    def network() -> nn.Module:
        made = over_ranks(nn.Linear(2, 2), find_unused=False)
        groups.append(weakref.ref(torch.distributed.group.WORLD))
        return made

    def run() -> None:
        cycle = [network()]
        cycle.append(cycle)  # type: ignore[arg-type]
        raise RuntimeError("Connection closed by peer")

    alone = (torch.distributed.HashStore(), 0, 1)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda method: iter([alone]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConnectionError, match="go on with --resume"), process_group():
        run()
    assert [group() for group in groups] == [None]


def workers(parent: subprocess.Popen[str]) -> list[int]:
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return sorted(int(pid) for pid in listed if b"tetdeploy" in Path(f"/proc/{pid}/cmdline").read_bytes())


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + _SECONDS
    while not done():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=30)[0]
        time.sleep(0.1)
