"""Several real processes, and runs that are killed: the same numbers as one process that runs to its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_script
from scripts import fork

from trainer.checkpoints import MANIFEST_NAME, is_complete, last_complete_checkpoint


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(tasks, folder, processes=1) -> list[int]:
    """Exit codes of processes that run `tasks`, forks of this one; when one has failed, the others are killed."""
    port = free_port()
    ranks = [
        fork(training_script.run_rank, tasks, rank, processes, port, stderr=folder / f"stderr_{rank}.txt")
        for rank in range(processes)
    ]
    end = time.monotonic() + 120
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks) or time.monotonic() > end:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.exitcode for rank in ranks]


def launch_script(tasks, processes) -> subprocess.CompletedProcess:
    """The same as a script with its own interpreters, as users launch it."""
    # `accelerate launch --cpu --num_processes 2` starts one process only (it leaves the others to mpirun).
    where = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *where]
    command += [training_script.__file__, json.dumps(tasks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["EXPECTED_PROCESSES"] = str(processes)
    folder = Path(training_script.__file__).parent
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


def losses(folder) -> dict[int, float]:
    lines = (Path(folder) / "losses.jsonl").read_text().splitlines()
    return dict(map(json.loads, lines))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """One launch of two processes: all equivalence scenarios, and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("two")
    codes = launch([{"equivalence": str(folder)}, {"folder": str(folder)}], folder, processes=2)
    assert codes == [0, 0], (folder / "stderr_0.txt").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    results = training_script.run_equivalence(str(folder))
    for optimizer in training_script.SHARDED:
        results[f"sharded_{optimizer}"] = training_script.run_sharded(str(folder), optimizer)
    training_script.run_resumable(str(folder))
    return folder, results


@pytest.mark.parametrize("scenario", list(training_script.EQUIVALENCE))
def test_two_processes_compute_what_one_computes_with_the_double_batch(scenario, one_process, two_processes):
    expected = one_process[1][scenario]
    found = torch.load(two_processes / "results.pt", weights_only=True)[scenario]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for name, value in expected["state"].items():
        assert torch.allclose(found["state"][name], value, atol=2e-5), name


def test_two_processes_evaluate_and_predict_every_document_once_in_file_order(one_process, two_processes):
    expected = one_process[1]["encoder"]
    found = torch.load(two_processes / "results.pt", weights_only=True)["encoder"]
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    assert torch.equal(found["predictions"], expected["predictions"])


@pytest.mark.parametrize("optimizer", list(training_script.SHARDED))
def test_a_model_sharded_over_two_processes_learns_what_one_process_learns(optimizer, one_process, two_processes):
    expected = one_process[1][f"sharded_{optimizer}"]
    found = torch.load(two_processes / "results.pt", weights_only=True)[f"sharded_{optimizer}"]
    assert len(found["losses"]) == 3 and found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-3, atol=1e-3)
    assert set(found["state"]) == set(expected["state"])
    if optimizer == "sgd":
        for name, value in expected["state"].items():
            assert torch.allclose(found["state"][name], value, atol=2e-5), name


def test_the_encoder_route_refuses_a_sharded_model(two_processes):
    error = torch.load(two_processes / "results.pt", weights_only=True)["sharded_sgd"]["error"]
    assert "which FSDP shards" in error and '`label_encoding="embedding"`, or DDP' in error


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux can hold single threads back")
def test_two_processes_end_although_the_threads_of_gloo_come_late():
    for _ in range(3):
        done = launch_script([{"busy_end": True}], processes=2)
        assert done.returncode == 0, done.stderr[-3000:]


def check_resumed(folder, uninterrupted, first_step):
    found, expected = losses(folder), losses(uninterrupted)
    assert set(found) == set(range(1, 8))
    for step in range(first_step, 8):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


def test_a_run_killed_in_its_second_epoch_continues_with_the_same_losses(tmp_path, one_process):
    assert launch([{"folder": str(tmp_path), "kill_at": 6}], tmp_path) == [-signal.SIGKILL]
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    training_script.run_resumable(str(tmp_path), resume=True)
    check_resumed(tmp_path, one_process[0], 5)


def test_a_run_killed_in_the_middle_of_a_save_resumes_from_the_checkpoint_before(tmp_path, one_process):
    assert launch([{"folder": str(tmp_path), "kill_in_save": 4}], tmp_path) == [-signal.SIGKILL]
    assert (tmp_path / "checkpoint-4").exists() and not is_complete(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    training_script.run_resumable(str(tmp_path), resume=True)
    check_resumed(tmp_path, one_process[0], 3)
    assert is_complete(tmp_path / "checkpoint-4")


def test_two_processes_killed_in_the_second_epoch_continue_with_the_same_losses(tmp_path, two_processes):
    assert launch([{"folder": str(tmp_path), "kill_at": 6}], tmp_path, processes=2)[0] == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    codes = launch([{"folder": str(tmp_path), "resume": True}], tmp_path, processes=2)
    assert codes == [0, 0], (tmp_path / "stderr_0.txt").read_text()[-3000:]
    check_resumed(tmp_path, two_processes, 5)


def test_a_streamed_run_resumes_in_its_first_pass_with_the_same_losses(tmp_path):
    import shutil

    trainer = training_script.run_streamed(str(tmp_path))
    expected = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    shutil.rmtree(tmp_path / "checkpoint-7")
    trainer = training_script.run_streamed(str(tmp_path))
    found = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert set(found) == set(range(1, 8)) and found == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_with_a_missing_or_truncated_file_is_not_whole(tmp_path, one_process):
    import shutil

    copy = tmp_path / "checkpoint-6"
    shutil.copytree(one_process[0] / "checkpoint-6", copy)
    assert is_complete(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert not is_complete(copy)
    shutil.copy(one_process[0] / "checkpoint-6" / "model.safetensors", copy)
    assert is_complete(copy)
    (copy / "optimizer.pt").unlink()
    assert not is_complete(copy)
    (copy / MANIFEST_NAME).write_text("{")
    assert not is_complete(copy)
    assert last_complete_checkpoint(tmp_path) is None
