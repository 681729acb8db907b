"""From training to the Hub and back, through huggingface_hub's own HTTP client against a Hub on loopback."""

import json
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from hub_client import DESCRIPTIONS, LABELS
from hub_server import HubServer
from huggingface_hub import ModelCard
from packaging.requirements import Requirement


CLIENT = Path(__file__).with_name("hub_client.py")
CODE = {
    "checkpoint_checks_sep_mldc.py",
    "classification_loss_sep_mldc.py",
    "configuration_sep_mldc.py",
    "encoder_sep_mldc.py",
    "explanation_sep_mldc.py",
    "handler.py",
    "label_editing_sep_mldc.py",
    "label_table_sep_mldc.py",
    "label_texts_sep_mldc.py",
    "lexical_sep_mldc.py",
    "modeling_sep_mldc.py",
    "pipeline_sep_mldc.py",
    "static_encoder_sep_mldc.py",
    "top_k_sep_mldc.py",
}
COMPLETE = CODE | {
    "requirements.txt",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}
TOKENS = {"hf_alice": "alice"}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The Hub after all clients have run, what they saw, and their folder."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(TOKENS) as hub:
        hub.fail_next("PUT", "/storage/")
        hub.fail_next("POST", "/api/models/alice/cut/commit/")
        hub.fail_next("POST", "/api/models/alice/every/commit/")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        seen = []
        for what in ("with_package", "without_package"):
            environment["HF_HOME"] = str(folder / f"home_{what}")
            done = subprocess.run(
                [sys.executable, "-I", str(CLIENT), what, str(folder)],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            seen.append(json.loads((folder / f"{what}.json").read_text()) | {"stderr": done.stderr})
        yield hub, *seen, folder


def assert_same(logits, expected):
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


def commits(hub, repo_id):
    """Title → files of each commit, the first one first."""
    repo = hub.repos[repo_id]
    return {commit.title: set(commit.files) for commit in repo.commits.values()}


def test_with_the_package_a_pulled_model_scores_as_the_trained_one(session):
    _, seen, _, _ = session
    for name in ("pulled", "pulled again"):
        class_name, logits = seen[name]
        assert class_name == "SepMldcForMultiLabelClassification"
        assert_same(logits, seen["logits"])


def test_without_the_package_the_flag_gives_the_same_class_and_scores(session):
    _, trained, seen, _ = session
    assert seen["blocked"] == ["ModuleNotFoundError"] * 3
    assert seen["class"] == "SepMldcForMultiLabelClassification" and seen["module"].startswith("transformers_modules.")
    for name in ("logits", "AutoModel", "sharded", "third", "fourth"):
        assert_same(seen[name], trained["logits"])


def test_without_package_and_flag_the_message_names_the_flag(session):
    _, _, seen, _ = session
    kind, message = seen["no flag"]
    assert kind == "ValueError" and "trust_remote_code=True" in message and "alice/run" in message


def test_both_auto_classes_survive_from_hand_to_hand(session):
    hub, _, seen, _ = session
    for repo_id in ("alice/run", "alice/second", "alice/third"):
        auto_map = json.loads(hub.files(repo_id)["config.json"])["auto_map"]
        assert auto_map == seen["auto_map"] and set(auto_map) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForSequenceClassification",
        }
        assert CODE <= set(hub.files(repo_id))
    assert CODE <= set(seen["code"])


def test_an_inference_endpoint_answers_by_the_handler_of_a_pushed_model(session):
    _, _, seen, _ = session
    answers = seen["endpoint"]
    assert [entry["label"] for entry in answers["one"]] == [entry["label"] for entry in answers["many"][0]]
    assert len(answers["one"]) == 2 and len(answers["many"]) == 3
    best = max(seen["pipeline"][0], key=lambda entry: entry["score"])
    assert answers["one"][0]["label"] == best["label"] and answers["one"][0]["score"] == pytest.approx(best["score"])
    assert answers["dictionary"] == answers["one"]
    for words, (kind, message) in answers["errors"].items():
        assert kind == "ValueError" and words in message
    declared = {one.name: one.specifier for one in map(Requirement, requires("sep-mldc"))}
    installed = {one.name: one.specifier for one in map(Requirement, seen["requirements"])}
    assert installed["transformers"] == declared["transformers"]


def test_two_checkpoints_live_in_one_process(session):
    _, trained, seen, _ = session
    assert_same(seen["other"], trained["other logits"])
    assert_same(seen["first again"], trained["logits"])


def test_hostile_label_names_and_long_descriptions_survive(session):
    _, _, seen, _ = session
    assert seen["labels"] == LABELS and seen["descriptions"] == DESCRIPTIONS
    assert {entry["label"] for entry in seen["pipeline"][0]} == set(LABELS)


def test_a_revision_loads_what_was_pushed_to_it(session):
    _, trained, seen, _ = session
    assert_same(trained["revisions"]["main"], trained["logits"])
    assert_same(trained["revisions"]["next"], np.array(trained["logits"]) + 1)
    assert_same(seen["next"], trained["revisions"]["next"])


def test_a_sharded_checkpoint_has_several_weight_files(session):
    hub, _, _, _ = session
    files = set(hub.files("alice/sharded"))
    assert "model.safetensors.index.json" in files and sum(file.endswith(".safetensors") for file in files) > 1


@pytest.mark.parametrize(
    ("repo_id", "title", "prefix"),
    [
        ("alice/run", "Training in progress, step 2", ""),
        ("alice/run", "Training in progress, step 2, checkpoint", "last-checkpoint/"),
        ("alice/run", "Training in progress, step 4", ""),
        ("alice/run", "Training in progress, step 4, checkpoint", "last-checkpoint/"),
        ("alice/run", "End of training", ""),
        ("alice/every", "Training in progress, step 2", ""),
        ("alice/every", "Training in progress, step 3", ""),
    ],
)
def test_each_push_during_training_is_complete(session, repo_id, title, prefix):
    hub, _, _, _ = session
    files = commits(hub, repo_id)[title]
    assert {prefix + name for name in COMPLETE} <= files
    at_root = {name for name in files if "/" not in name}
    assert not at_root & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    if prefix:
        assert {prefix + name for name in ("optimizer.pt", "trainer_state.json", "training_args.bin")} <= files


def test_each_commit_of_the_training_loads_as_it_was_pushed(session):
    hub, trained, seen, _ = session
    assert set(seen["commits"]) == set(commits(hub, "alice/run")) - {"initial commit"}
    for title in ("End of training", "Training in progress, step 4", "Training in progress, step 4, checkpoint"):
        assert_same(seen["commits"][title], trained["logits"])
    assert not np.allclose(seen["commits"]["Training in progress, step 2"], trained["logits"], atol=1e-6)


def test_the_pushed_card_says_what_was_measured(session):
    hub, trained, _, _ = session
    card = ModelCard(hub.files("alice/run")["README.md"].decode())
    results = {f"eval_{result.metric_type}": result.metric_value for result in card.data.eval_results}
    assert results["eval_p@1"] == pytest.approx(trained["measured"]["eval_p@1"])
    assert set(results) == {f"eval_{name}" for name in ("p@1", "ndcg@1", "psp@1", "f1_micro", "f1_macro")}
    assert card.data.license == "mit" and card.data.datasets == ["alice/documents"]
    assert "alice/run" in card.text and "![" in card.text and "training_curve.png" in hub.files("alice/run")
    early = next(c for c in hub.repos["alice/run"].commits.values() if c.title == "Training in progress, step 2")
    assert b"at step 2" in hub.blobs[early.files["README.md"]]


def test_a_readme_of_the_user_is_pushed_as_it_is(session):
    hub, _, _, folder = session
    own = b"---\nlicense: mit\n---\n# My own words\n"
    assert hub.files("alice/every")["README.md"] == own == (folder / "every" / "README.md").read_bytes()


def test_no_saved_or_pushed_byte_holds_the_token(session):
    hub, _, _, folder = session
    secrets = (b"hf_alice", b"hf_wrong")
    pushed = hub.every_byte()
    assert not any(secret in pushed for secret in secrets)
    saved = [path for path in folder.rglob("*") if path.is_file() and "home_" not in str(path)]
    assert any(path.name == "training_args.bin" for path in saved)
    assert [path for path in saved if any(secret in path.read_bytes() for secret in secrets)] == []
    assert hub.leaked == []


def test_configuration_tokenizer_and_card_tell_no_folder_of_the_machine(session):
    hub, _, _, folder = session
    for path, content in hub.files("alice/run").items():
        if not path.endswith(".bin") and not path.startswith("runs/"):
            assert str(folder).encode() not in content, path


def test_a_wrong_token_is_refused_clearly_and_nothing_is_pushed(session):
    hub, seen, _, _ = session
    for name in ("wrong token in trainer", "wrong token in push"):
        kind, message = seen[name]
        assert kind == "HfHubHTTPError" and "401" in message and "Invalid credentials" in message
    assert "alice/wrong" not in hub.repos and list(commits(hub, "alice/run")).count("End of training") == 1


def test_an_upload_that_was_interrupted_is_sent_again(session):
    hub, _, _, _ = session
    uploads = [(path, status) for method, path, status in hub.requests if method == "PUT" and "/storage/" in path]
    # Files go up side by side, so another may be answered before the one that was cut: only the order within a path holds.
    [cut] = [path for path, status in uploads if status == 0]
    assert [status for path, status in uploads if path == cut][:2] == [0, 200]
    assert {status for _, status in uploads} == {0, 200}


def test_a_push_whose_commit_was_interrupted_leaves_nothing_and_succeeds_when_repeated(session):
    hub, seen, _, _ = session
    assert seen["cut commit"][0] not in ("nothing", "RuntimeError")
    assert seen["files after cut"] == [".gitattributes"]
    assert CODE | {"config.json", "model.safetensors"} <= set(hub.files("alice/cut"))


def test_a_push_that_failed_during_training_is_reported_and_the_training_continues(session):
    hub, seen, _, _ = session
    assert "A push to alice/every during training failed" in seen["stderr"]
    assert list(commits(hub, "alice/every"))[1:] == [
        "Training in progress, step 2",
        "Training in progress, step 3",
    ]


def test_missing_and_private_names_say_so(session):
    hub, seen, _, _ = session
    kind, message = seen["missing name"]
    assert kind == "OSError" and "alice/no-such-model" in message
    kind, message = seen["private without token"]
    assert kind == "OSError" and "alice/secret" in message and "private" in message
    assert seen["private with token"][0] == "nothing" and hub.repos["alice/secret"].private


def test_nothing_of_the_push_stays_in_the_run_folder(session):
    _, _, _, folder = session
    assert not [
        path.name for run in ("run", "every") for path in (folder / run).iterdir() if path.name.startswith("_")
    ]
