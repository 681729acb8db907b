"""Names of version 0.1 keep working for one release, with one warning; in saved files they work silently."""

import json
import warnings

import pytest
import torch
from tiny_models import tiny_backbone, tiny_backbone_config, tiny_batch, tiny_model, tiny_tokenizer

from modeling_sep_mldc import SepMldcConfig, SepMldcForMultiLabelClassification


FORMER = {"label_support": [3, 2], "lexical_features": 4}


def test_former_fields_are_read_and_set_under_their_new_names_with_one_warning():
    with pytest.warns(
        FutureWarning, match="`label_support` is now called `label_counts`, `lexical_features`"
    ) as caught:
        config = SepMldcConfig(backbone_config=tiny_backbone_config(), num_labels=2, **FORMER)
    assert len(caught) == 1
    assert config.label_counts == [3, 2] and config.num_lexical_features == 4
    with pytest.warns(FutureWarning, match="label_counts"):
        assert config.label_support == [3, 2]
    assert not set(FORMER) & set(config.to_dict())


def test_a_field_under_both_names_is_refused():
    with pytest.raises(ValueError, match="`label_support` and `label_counts` are both given"):
        SepMldcConfig.from_dict({"label_support": [1, 1], "label_counts": [1, 1]})


def test_former_fields_of_a_saved_configuration_load_silently_and_overrides_warn(tmp_path):
    SepMldcConfig(backbone_config=tiny_backbone_config(), num_labels=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved = {name: value for name, value in saved.items() if name not in ("label_counts", "num_lexical_features")}
    (tmp_path / "config.json").write_text(json.dumps({**saved, **FORMER}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SepMldcConfig.from_pretrained(tmp_path)
    assert config.label_counts == [3, 2] and config.num_lexical_features == 4
    with pytest.warns(FutureWarning, match="label_counts"):
        config = SepMldcConfig.from_pretrained(tmp_path, label_support=[5, 5])
    assert config.label_counts == [5, 5]


def test_from_backbone_takes_former_fields(tmp_path):
    with pytest.warns(FutureWarning, match="num_lexical_features") as caught:
        model = SepMldcForMultiLabelClassification.from_backbone(
            tiny_backbone(tmp_path), tiny_tokenizer(), labels=["a", "b"], **FORMER
        )
    assert len([warning for warning in caught if warning.category is FutureWarning]) == 1
    assert model.config.label_counts == [3, 2] and model.lexical.feature_ids.shape == (2, 4)


def test_forward_takes_return_table():
    model = tiny_model()
    batch = tiny_batch()
    with pytest.warns(FutureWarning, match="`return_table` is now called `return_label_embeds`"):
        assert model(**batch, return_table=False).label_embeds is None
    del batch["labels"]
    with torch.no_grad(), pytest.warns(FutureWarning):
        assert model(**batch, return_table=True).label_embeds is not None
