"""The loss of telling, at each place of a list, which item comes next.

Shapes: V places of this rank's lists, N candidates, D dim.
"""

from __future__ import annotations

__all__ = ["NextItem"]

import torch

from embedshard.config.parts import SampledSoftmaxConfig
from embedshard.data.batch import Batch
from embedshard.models.dots import row_dots
from embedshard.models.objectives.objective import Hits, ListHits, Objective, OwnHits
from embedshard.models.objectives.softmax import softmax_losses
from embedshard.models.output import NextItemOutput
from embedshard.world import World


class NextItem(Objective):
    """Softmax over the item that comes next and items drawn for the step.

    Collective: gathers the drawn candidates over ranks, with gradient.

    Args:
        config: as in the config.
        world: whose ranks train together.
    """

    def __init__(self, config: SampledSoftmaxConfig, world: World) -> None:
        super().__init__()
        self._config, self._world = config, world

    def forward(self, output: NextItemOutput, batch: Batch) -> torch.Tensor:
        """Returns (V,) losses."""
        config, world = self._config, self._world
        assert batch.draws is not None, "the reader draws what this objective asks for"
        ids_N, candidate_ND = world.gather(batch.draws.ids), world.gather(output.negative_ND)
        offset_N = torch.zeros(len(ids_N), device=ids_N.device)
        if config.log_q == "on":
            offset_N = -torch.log(config.num_negatives * world.gather(batch.draws.log_q).double().exp()).float()
        query_VD = output.query_VD / config.temperature
        positive_V = row_dots(query_VD, output.target_VD)
        return softmax_losses(positive_V, query_VD, candidate_ND, offset_N, self._hits(output, batch, ids_N))

    def _hits(self, output: NextItemOutput, batch: Batch, ids_N: torch.Tensor) -> Hits:
        """Returns which of the drawn items are left out at which places."""
        if self._config.mask_list:
            items_I, list_I = torch.cat([output.item_V, output.target_V]), torch.cat([output.rows, output.rows])
            return ListHits(batch.size, output.rows, items_I, list_I, ids_N)
        # What is nobody's own is never left out.
        own_V = output.target_V if self._config.mask_accidental_hits else torch.full_like(output.target_V, -1)
        return OwnHits(own_V, ids_N)
