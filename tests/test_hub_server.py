"""The Hub that the tests push to behaves, for huggingface_hub's own client, like the real one."""

import os
import subprocess
import sys

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
WEIGHTS = os.urandom(300_000)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(TOKENS) as hub:
        yield hub
        assert hub.leaked == [], "the client sent its token to the storage origin"


@pytest.fixture
def alice(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "näme, with blank.txt").write_text("text")
    (folder / "empty.txt").write_text("")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def test_a_pushed_folder_comes_back_byte_for_byte(hub, alice, folder, tmp_path):
    alice.create_repo("alice/model")
    commit = alice.upload_folder(repo_id="alice/model", folder_path=folder)
    pulled = snapshot_download(
        "alice/model", endpoint=hub.endpoint, token=False, cache_dir=tmp_path / "cache", revision=commit.oid
    )
    for path in ("config.json", "sub/näme, with blank.txt", "empty.txt", "model.safetensors"):
        with open(os.path.join(pulled, path), "rb") as file:
            assert file.read() == (folder / path).read_bytes()
    assert os.path.basename(pulled) == commit.oid
    assert hub.count("PUT", "/storage/") == 1  # only the weights go through LFS


def test_an_unchanged_file_is_not_sent_again(hub, alice, folder):
    alice.create_repo("alice/model")
    first = alice.upload_folder(repo_id="alice/model", folder_path=folder)
    second = alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert second.oid == first.oid and max(hub.uploaded.values()) == 1


def test_info_tree_refs_and_history_tell_what_was_committed(hub, alice, folder):
    alice.create_repo("alice/model")
    alice.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="weights")
    paths = {".gitattributes", "config.json", "empty.txt", "model.safetensors", "sub/näme, with blank.txt"}
    assert set(alice.list_repo_files("alice/model")) == paths
    info = alice.model_info("alice/model")
    assert {sibling.rfilename for sibling in info.siblings} == paths and not info.private
    top = {entry.path: entry for entry in alice.list_repo_tree("alice/model")}
    assert "sub" in top and top["model.safetensors"].lfs.size == len(WEIGHTS)
    assert [commit.title for commit in alice.list_repo_commits("alice/model")] == ["weights", "initial commit"]
    assert [ref.name for ref in alice.list_repo_refs("alice/model").branches] == ["main"]
    assert alice.get_paths_info("alice/model", ["config.json"])[0].size == 2
    assert alice.whoami()["name"] == "alice"


def test_branches_and_tags_are_revisions(hub, alice, folder, tmp_path):
    alice.create_repo("alice/model")
    alice.upload_folder(repo_id="alice/model", folder_path=folder)
    alice.create_tag("alice/model", tag="v1")
    alice.create_branch("alice/model", branch="next/one")
    alice.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id="alice/model", revision="next/one")
    texts = {}
    for revision in ("main", "v1", "next/one"):
        path = hf_hub_download(
            "alice/model", "config.json", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path, token=False
        )
        texts[revision] = open(path).read()
    assert texts == {"main": "{}", "v1": "{}", "next/one": "new"}
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/model", revision="v2")


def test_a_missing_name_or_file_is_told_apart(hub, alice, folder, tmp_path):
    alice.create_repo("alice/model")
    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/other")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/model", "none.txt", endpoint=hub.endpoint, cache_dir=tmp_path)
    alice.create_repo("alice/model", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("alice/model")


def test_a_private_repository_opens_for_its_owner_only(hub, alice, folder, tmp_path):
    alice.create_repo("alice/secret", private=True)
    alice.upload_folder(repo_id="alice/secret", folder_path=folder)
    assert alice.model_info("alice/secret").private
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).model_info("alice/secret")
    path = hf_hub_download(
        "alice/secret", "model.safetensors", token="hf_alice", endpoint=hub.endpoint, cache_dir=tmp_path
    )
    assert open(path, "rb").read() == WEIGHTS


@pytest.mark.parametrize(("token", "status"), [("hf_wrong", 401), ("hf_bob", 403), (False, 401)])
def test_nobody_else_writes(hub, alice, folder, token, status):
    alice.create_repo("alice/model")
    before, commits = len(hub.blobs), len(hub.repos["alice/model"].commits)
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(endpoint=hub.endpoint, token=token).upload_folder(repo_id="alice/model", folder_path=folder)
    assert error.value.response.status_code == status
    assert (len(hub.blobs), len(hub.repos["alice/model"].commits)) == (before, commits)


def test_an_upload_that_was_interrupted_is_sent_again_by_the_client(hub, alice, folder):
    alice.create_repo("alice/model")
    hub.fail_next("PUT", "/storage/")
    alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert [status for method, _, status in hub.requests if method == "PUT"] == [0, 200]
    assert hub.files("alice/model")["model.safetensors"] == WEIGHTS


def test_a_refused_upload_leaves_the_branch_unchanged(hub, alice, folder):
    alice.create_repo("alice/model")
    hub.fail_next("PUT", "/storage/", status=403)
    with pytest.raises(RuntimeError, match="model.safetensors"):
        alice.upload_folder(repo_id="alice/model", folder_path=folder)
    assert set(hub.files("alice/model")) == {".gitattributes"}


def test_a_download_that_was_interrupted_continues_where_it_stopped(hub, alice, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what the client keeps of a cut answer
    alice.create_repo("alice/model")
    alice.upload_folder(repo_id="alice/model", folder_path=folder)
    hub.fail_next("GET", "/storage/")
    path = hf_hub_download("alice/model", "model.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    assert open(path, "rb").read() == WEIGHTS
    assert [status for method, path, status in hub.requests if method == "GET" and "/storage/" in path] == [200, 206]


def test_deleted_files_leave_and_a_stale_parent_is_refused(hub, alice, folder):
    alice.create_repo("alice/model")
    first = alice.upload_folder(repo_id="alice/model", folder_path=folder)
    alice.delete_file("config.json", "alice/model")
    assert "config.json" not in hub.files("alice/model")
    with pytest.raises(HfHubHTTPError, match="412"):
        alice.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="alice/model", parent_commit=first.oid)


BERT_ROUND_TRIP = """
import sys, torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer
folder = sys.argv[1]
vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"])}
tokenizer = BertTokenizer(vocab=vocabulary)
model = BertModel(BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=16)).eval()
model.push_to_hub("alice/bert", token="hf_alice")
tokenizer.push_to_hub("alice/bert", token="hf_alice")
pulled = AutoModel.from_pretrained("alice/bert", token=False)
inputs = AutoTokenizer.from_pretrained("alice/bert", token=False)("a b c", return_tensors="pt")
torch.testing.assert_close(pulled(**inputs).last_hidden_state, model(**inputs).last_hidden_state, rtol=0, atol=1e-6)
"""


@pytest.mark.slow  # test_hub.py does the same with this project's model
def test_transformers_own_model_and_tokenizer_make_the_round_trip(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", BERT_ROUND_TRIP, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("alice/bert"))
