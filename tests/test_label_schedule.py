"""The choice of the label texts that a training step encodes, and the state of the stored label embeddings."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer

from trainer.label_schedule import LabelSchedule


def schedule_for(model=None, labels_per_step=2, seed=0):
    schedule = LabelSchedule(tiny_tokenizer(), labels_per_step, seed=seed)
    if model is not None:
        schedule.prepare(model.config.label_texts)
    return schedule


def labels_with(present, num_labels):
    labels = torch.zeros(3, num_labels)
    labels[0, present] = 1
    return labels


# Drawn by the version before this class: a run that was started there continues with the same labels.
DRAWN = {
    (4, 6, 42, (1, 5)): [[1, 2, 3, 5], [1, 2, 4, 5], [1, 2, 3, 5], [1, 2, 4, 5]],
    (2, 6, 7, (0, 1, 2, 3)): [[0, 2], [0, 1], [1, 3], [0, 1]],
    (8, 200, 42, (1, 7, 100)): [
        [1, 7, 63, 81, 100, 110, 127, 136],
        [1, 7, 18, 68, 75, 100, 138, 176],
        [1, 7, 38, 60, 87, 100, 115, 158],
        [1, 7, 54, 72, 100, 130, 160, 164],
    ],
}


@pytest.mark.parametrize(("setting", "expected"), DRAWN.items())
def test_the_choice_is_that_of_former_versions(setting, expected):
    cap, num_labels, seed, present = setting
    schedule, labels = schedule_for(labels_per_step=cap, seed=seed), labels_with(list(present), num_labels)
    assert [schedule.select(labels, step).tolist() for step in (0, 3, 3, 4)] == expected


def test_labels_of_the_batch_come_first_then_random_others():
    schedule, labels = schedule_for(labels_per_step=4), labels_with([1, 5], 6)
    picks = [schedule.select(labels, step).tolist() for step in range(30)]
    assert all({1, 5} <= set(pick) and len(pick) <= 4 and pick == sorted(set(pick)) for pick in picks)
    assert {label for pick in picks for label in pick} == set(range(6))
    assert len(schedule_for(labels_per_step=2).select(labels_with([0, 1, 2, 3, 4, 5], 6), 0)) == 2
    assert schedule_for(labels_per_step=6).select(labels, 0).tolist() == list(range(6))


def test_the_choice_depends_on_seed_step_and_micro_step_alone():
    labels = labels_with([1], 200)

    def picks(seed, steps):
        schedule, result = schedule_for(labels_per_step=20, seed=seed), []
        for step in steps:
            torch.rand(1)  # the state of the global generator does not matter
            result.append(tuple(schedule.select(labels, step).tolist()))
        return result

    first = picks(1, [3, 3, 4])
    assert first == picks(1, [3, 3, 4]) and len(set(first)) == 3
    assert picks(1, [4]) == first[2:], "a resumed run draws something else"
    assert picks(2, [3])[0] != first[0]
    schedule = schedule_for(labels_per_step=20, seed=1)
    again = []
    for _ in range(2):
        schedule.restart()
        again.append(tuple(schedule.select(labels, 3).tolist()))
    assert again == [first[0], first[0]]


def test_inputs_are_the_texts_of_the_chosen_labels_and_commit_stores_their_rows_alone():
    model = tiny_model(num_labels=5)
    schedule = schedule_for(model)
    batch = tiny_batch()
    candidates = torch.tensor([1, 4])
    outputs = model(**batch, **schedule.inputs(candidates))
    before = model.label_embeddings.clone()
    rows = torch.randn_like(outputs.candidate_embeds)
    torch.testing.assert_close(outputs.candidate_embeds, before[[1, 4]])
    schedule.is_fresh = True
    schedule.commit(model, candidates, rows.requires_grad_())
    assert torch.equal(model.label_embeddings[[1, 4]], rows) and not model.label_embeddings.requires_grad
    assert torch.equal(model.label_embeddings[[0, 2, 3]], before[[0, 2, 3]])
    assert not schedule.is_fresh


def test_refresh_encodes_all_texts_once_until_something_changes():
    model = tiny_model(num_labels=5)
    schedule, seen = schedule_for(model), []
    expected = model.label_embeddings.clone()
    model.label_embeddings.zero_()
    schedule.refresh(model, batch_size=2, progress=seen.append)
    torch.testing.assert_close(model.label_embeddings, expected)
    assert sum(seen) == 5 and len(seen) == 3
    model.label_embeddings.zero_()
    schedule.refresh(model)
    assert not model.label_embeddings.any(), "fresh embeddings were encoded again"
    schedule.invalidate()
    schedule.refresh(model)
    torch.testing.assert_close(model.label_embeddings, expected)


def test_a_renamed_label_is_encoded_again_from_its_new_text():
    model = tiny_model(num_labels=3)
    schedule = schedule_for(model)
    schedule.refresh(model)
    before = model.label_embeddings.clone()
    model.config.label_descriptions = {model.config.labels[1]: "galaxy and stars"}
    schedule.refresh(model)
    assert not torch.allclose(model.label_embeddings[1], before[1])
    torch.testing.assert_close(model.label_embeddings[[0, 2]], before[[0, 2]])


def test_token_ids_of_ones_own_are_kept_while_the_texts_stay_and_missing_ones_are_reported():
    model = tiny_model(num_labels=2)
    with pytest.raises(ValueError, match="Call `prepare`"):
        schedule_for(labels_per_step=1).inputs(torch.tensor([0]))
    schedule = schedule_for(model, labels_per_step=1)
    schedule.label_inputs = {"input_ids": [[2, 10, 3], [2, 11, 3]], "pad_token_id": 1}
    schedule.refresh(model)
    assert schedule.inputs(torch.tensor([1]))["candidate_input_ids"][0, :3].tolist() == [2, 11, 3]
