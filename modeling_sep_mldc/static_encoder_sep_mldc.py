"""A text encoder without layers: a table of token embeddings and the weight of each token. `trainer.distill` trains it."""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput


@strict
class StaticEncoderConfig(PreTrainedConfig):
    r"""
    Configuration of a [`StaticEncoder`].

    Args:
        vocab_size (`int`, *optional*, defaults to 30522): V, number of tokens.
        hidden_size (`int`, *optional*, defaults to 384): d, size of an embedding.
        pad_token_id (`int`, *optional*, defaults to 0): id of the padding token.
        num_hidden_layers (`int`, *optional*, defaults to 0): there are none.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of new embeddings.
    """

    model_type = "sep_mldc_static"

    vocab_size: int = 30522
    hidden_size: int = 384
    pad_token_id: int | None = 0
    num_hidden_layers: int = 0
    initializer_range: float = 0.02


class StaticEncoder(PreTrainedModel):
    r"""
    Embeddings of tokens that do not depend on their context. The embedding of a text is the weighted mean
    $\sum_t w_t e_t / \sum_t w_t$ over its tokens, with one learned weight $w_t > 0$ per token of the vocabulary.

    Args:
        config ([`StaticEncoderConfig`]): the configuration; weights start at random.
    """

    config_class = StaticEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    _auto_class = "AutoModel"

    def __init__(self, config: StaticEncoderConfig):
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_log_weights = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.token_log_weights)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embeddings

    @torch.no_grad()
    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """As in transformers. The log weights of new tokens are set to the mean of the existing ones."""
        self.token_embeddings = value
        weights, size = self.token_log_weights, value.num_embeddings
        if size != len(weights):
            added = weights.mean().expand(max(size - len(weights), 0))
            self.token_log_weights = nn.Parameter(torch.cat([weights[:size], added]))

    def token_shares(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Share (B, T) of each token in the embedding of its text, in float32; 0 for padding, and the shares of a text sum to 1."""
        weights = self.token_log_weights[input_ids].float()
        return torch.softmax(weights.masked_fill(attention_mask == 0, -1e9), dim=-1) * (attention_mask > 0)

    def mean_embeds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, d) of texts: the mean of what `forward` returns for their tokens, in one pass over the table."""
        shares = self.token_shares(input_ids, attention_mask).to(self.token_embeddings.weight.dtype)
        return F.embedding_bag(input_ids, self.token_embeddings.weight, mode="sum", per_sample_weights=shares)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`): the texts.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, d)`, *optional*): instead of `input_ids`; all tokens count the same.
            output_attentions, output_hidden_states (`bool`, *optional*): there are none.

        Returns:
            `BaseModelOutput`: `last_hidden_state` (B, T, d), whose mean over the attended tokens is the embedding of the text.
        """
        states = inputs_embeds if inputs_embeds is not None else self.token_embeddings(input_ids)
        if inputs_embeds is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            scale = self.token_shares(input_ids, mask) * mask.sum(dim=-1, keepdim=True)
            states = states * scale.unsqueeze(-1).to(states.dtype)
        return BaseModelOutput(last_hidden_state=states)


# Registered here, so that checkpoints on the Hub find the class without this package.
AutoConfig.register(StaticEncoderConfig.model_type, StaticEncoderConfig, exist_ok=True)
AutoModel.register(StaticEncoderConfig, StaticEncoder, exist_ok=True)
