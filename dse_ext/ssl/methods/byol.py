"""BYOL: one view's target embedding is predicted from the other view."""

from __future__ import annotations

from torch import Tensor, nn

from dse_ext.ssl.methods.base import recipe
from dse_ext.ssl.methods.siamese import RESNET, Embedded, Predictive


class BYOL(Predictive):
    """BYOL with lightly's heads, loss and transform.

    The loss is the negative cosine similarity, which is the paper's squared distance of
    normalized vectors (Eq. 2) up to a factor and a constant. Source: "Bootstrap Your Own Latent",
    2020, https://arxiv.org/abs/2006.07733.
    """

    name = "byol"
    title = "BYOL"
    paper = "Grill et al., NeurIPS 2020"
    url = "https://arxiv.org/abs/2006.07733"
    recipe = recipe(RESNET, optimizer="lars", lr=0.4, weight_decay=1e-6, weight_decay_end=1e-6)

    def make_projector(self) -> nn.Module:
        """Lightly's BYOL projection head."""
        from lightly.models.modules.heads import BYOLProjectionHead

        o = self.options
        return BYOLProjectionHead(self.student.dim, o.hidden_dim, o.output_dim)

    def make_predictor(self) -> nn.Module:
        """Lightly's BYOL prediction head."""
        from lightly.models.modules.heads import BYOLPredictionHead

        o = self.options
        return BYOLPredictionHead(o.output_dim, o.hidden_dim, o.output_dim)

    def compare(self, first: Embedded, second: Embedded) -> Tensor:
        """Negative cosine similarity of prediction and target."""
        from lightly.loss.negative_cosine_similarity import NegativeCosineSimilarity

        return NegativeCosineSimilarity()(first.embedding, second.embedding)
