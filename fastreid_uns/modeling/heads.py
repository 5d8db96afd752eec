"""Feature map → features: pooling, projection, neck, unit length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import Tokens, feature_map
from fastreid_uns.modeling.whitening import ViewWhitening
from fastreid_uns.registry import HEAD_REGISTRY
from fastreid_uns.structures import HeadOutput

POOLINGS = ("avg", "max", "avgmax", "gem")
NECKS = ("bnneck", "none")
FUSIONS = ("class", "mean", "cat")


class Pool(nn.Module):
    """One vector for each of `rows` horizontal stripes of a map, in float32.

    Stripe i of P covers the lines from floor(i*h/P) to ceil((i+1)*h/P), so stripes overlap where P does not divide h.

    Args:
        kind: avg, max, avgmax (their sum) or gem: (mean over positions of max(x, 1e-6)^p)^(1/p) with one learnable p.
        rows: stripes; 1 pools the whole map.

    Raises:
        ValueError: unknown kind.

    Source: Radenovic et al. 2018 (GeM), eq. 3.
    """

    def __init__(self, kind: str, rows: int = 1) -> None:
        super().__init__()
        _check("POOLING", kind, POOLINGS)
        self.kind = kind
        self.rows = rows
        if kind == "gem":
            self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) of any float type → (B,rows,C) float32.

        Raises:
            ValueError: the map has fewer lines than there are stripes.
        """
        height = x.shape[2]
        if height < self.rows:
            raise InvalidValue(
                f"MODEL.HEAD.PARTS is {self.rows} but the feature map has {height} lines; a stripe needs a line of its "
                f"own. Lower PARTS, raise the height in INPUT.SIZE, or set MODEL.BACKBONE.LAST_STRIDE to 1."
            )
        if self.kind == "gem":
            x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=1e-6).pow(self.p)
        edges = [(i * height // self.rows, -(-(i + 1) * height // self.rows)) for i in range(self.rows)]
        pooled = torch.stack([self._reduce(x[:, :, start:stop]) for start, stop in edges], dim=1)
        return pooled.pow(1.0 / self.p) if self.kind == "gem" else pooled

    def _reduce(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.kind == "max":
            return x.amax((2, 3)).to(dtype)
        mean = x.mean((2, 3), dtype=dtype)
        return mean + x.amax((2, 3)) if self.kind == "avgmax" else mean


class Embedding(nn.Module):
    """Linear projection (if `dim` is positive), then the neck; the result is not yet of unit length.

    The neck `bnneck` is a batch norm whose weight starts at 1 and whose bias stays 0. `bias` is that of the projection.

    Raises:
        ValueError: unknown neck, or `dim` is negative.

    Source: Luo et al. 2019 (Bag of Tricks), section 3.5.
    """

    def __init__(self, in_channels: int, dim: int, neck: str, *, bias: bool = True) -> None:
        super().__init__()
        _check("NECK", neck, NECKS)
        if dim < 0:
            raise InvalidValue(f"MODEL.HEAD.DIM is {dim}; 0 (no projection) or more is accepted. Change it.")
        self.dim = dim or in_channels
        self.project: nn.Module = nn.Identity()
        if dim:
            linear = nn.Linear(in_channels, dim, bias=bias)
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            if bias:
                nn.init.zeros_(linear.bias)
            self.project = linear
        self.neck: nn.Module = nn.Identity()
        if neck == "bnneck":
            norm = nn.BatchNorm1d(self.dim)
            norm.bias.requires_grad_(False)
            self.neck = norm

    def forward(self, pooled: Tensor) -> Tensor:
        """(B,C) float32 → (B,D) float32."""
        return self.neck(self.project(pooled))


@HEAD_REGISTRY.register()
class EmbeddingHead(nn.Module):
    """Global pooling, projection, neck, unit length. Computes in float32 under autocast as well.

    Args:
        in_channels: C of the feature map.
        pooling: avg, max, avgmax or gem; of a transformer the patches are pooled.
        dim: D of a linear projection before the neck; 0 = none, D = C.
        neck: bnneck or none.

    Raises:
        ValueError: unknown pooling or neck, or `dim` is negative.
    """

    def __init__(self, in_channels: int, *, pooling: str = "avg", dim: int = 0, neck: str = "bnneck") -> None:
        super().__init__()
        self.pool = Pool(pooling)
        self.embed = Embedding(in_channels, dim, neck)
        self.dim = self.embed.dim

    def forward(self, output: Tensor | Tokens) -> HeadOutput:
        """What the backbone gives → `HeadOutput` without parts."""
        x = feature_map(output)
        with torch.autocast(x.device.type, enabled=False):
            pooled = self.pool(x).squeeze(1)
            unnormalized = self.embed(pooled)
            return HeadOutput(pooled, F.normalize(unnormalized), unnormalized=unnormalized)


@HEAD_REGISTRY.register()
class PooledHead(nn.Module):
    """Average and GeM pooling side by side, and the cells of a grid; whitened where `dim` is set. Without neck.

    Nothing in it is trained: GeM has the power 3, and `whitening.fit` sets the whitening. Computes in float32.

    Args:
        in_channels: C of the feature map.
        grid: G, the map is cut into G x G cells, each of which is average pooled; 0 = no cells. Cells overlap where G
            does not divide the map.
        dim: D of a `ViewWhitening` before unit length; 0 = none, D = (2 + G^2) C.

    Raises:
        ValueError: `grid` or `dim` is negative.
    """

    def __init__(self, in_channels: int, *, grid: int = 0, dim: int = 0) -> None:
        super().__init__()
        for key, value in (("GRID", grid), ("DIM", dim)):
            if value < 0:
                raise InvalidValue(f"MODEL.HEAD.{key} is {value}; 0 (none) or more is accepted. Change it.")
        self.grid = grid
        self.average, self.gem = Pool("avg"), Pool("gem")
        self.gem.p.requires_grad_(False)
        width = (2 + grid**2) * in_channels
        self.whitening = ViewWhitening(width, dim) if dim else None
        self.dim = self.whitening.dim if self.whitening else width

    def forward(self, output: Tensor | Tokens) -> HeadOutput:
        """What the backbone gives → `HeadOutput`; `pooled` (B,(2+G^2)C): average, GeM, cells, each of unit length."""
        x = feature_map(output)
        with torch.autocast(x.device.type, enabled=False):
            pooled = [F.normalize(pool(x).squeeze(1)) for pool in (self.average, self.gem)]
            if self.grid:
                pooled.append(F.normalize(grid_cells(x, self.grid).flatten(1)))
            whole = torch.cat(pooled, dim=1)
            raw = whole if self.whitening is None else self.whitening(whole)
            return HeadOutput(whole, F.normalize(raw), unnormalized=raw)


def grid_cells(x: Tensor, grid: int) -> Tensor:
    """(B,C,h,w) of any float type → (B,G,G,C), means of the cells of a grid, at least float32.

    Cell i of a side of n covers floor(i*n/G) to ceil((i+1)*n/G), so cells overlap where G does not divide n.
    """
    rows, columns = ([slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)] for side in x.shape[2:])
    dtype = torch.promote_types(x.dtype, torch.float32)
    cells = [[x[:, :, row, column].mean((2, 3), dtype=dtype) for column in columns] for row in rows]
    return torch.stack([torch.stack(line, dim=1) for line in cells], dim=1)


@HEAD_REGISTRY.register()
class PartHead(EmbeddingHead):
    """The global branch of `EmbeddingHead` and one branch for each of P horizontal stripes, with necks of their own.

    Args:
        parts: P, stripes from top to bottom.

    Raises:
        ValueError: as `EmbeddingHead`; fewer than 2 parts; in forward, a map with fewer lines than parts.

    Source: Cho et al. 2022 (PPLR), section 3.1; Lan et al. 2023 (Learning to Purification).
    """

    def __init__(
        self, in_channels: int, *, parts: int = 3, pooling: str = "avg", dim: int = 0, neck: str = "bnneck"
    ) -> None:
        super().__init__(in_channels, pooling=pooling, dim=dim, neck=neck)
        if parts < 2:
            raise InvalidValue(f"MODEL.HEAD.PARTS is {parts}; 2 or more are accepted. Take EmbeddingHead for none.")
        self.part_pool = Pool(pooling, parts)
        self.part_embed = nn.ModuleList(Embedding(in_channels, dim, neck) for _ in range(parts))

    def forward(self, output: Tensor | Tokens) -> HeadOutput:
        """What the backbone gives → `HeadOutput` with parts (B,P,D) of unit length."""
        whole = super().forward(output)
        x = feature_map(output)
        with torch.autocast(x.device.type, enabled=False):
            stripes = self.part_pool(x).unbind(1)
            parts = [embed(stripe) for embed, stripe in zip(self.part_embed, stripes, strict=True)]
            unnormalized = torch.stack(parts, dim=1)
            return whole._replace(parts=F.normalize(unnormalized, dim=2), unnormalized_parts=unnormalized)


@HEAD_REGISTRY.register()
class TokenHead(nn.Module):
    """Features of a transformer from its class token c and the mean m of its part tokens.

    Args:
        in_channels: C of a token.
        fuse: class (c), mean ((c+m)/2) or cat (c and m side by side, 2C wide).
        dim: D of a linear projection before the neck; 0 = none.
        neck: bnneck or none.

    Raises:
        ValueError: unknown fusion or neck, or `dim` is negative; in forward, a backbone without these tokens.

    Source: Zhu et al. 2022 (PASS), section 3.4.
    """

    def __init__(self, in_channels: int, *, fuse: str = "class", dim: int = 0, neck: str = "bnneck") -> None:
        super().__init__()
        _check("FUSE", fuse, FUSIONS)
        self.fuse = fuse
        self.embed = Embedding(in_channels * (2 if fuse == "cat" else 1), dim, neck)
        self.dim = self.embed.dim

    def forward(self, output: Tensor | Tokens) -> HeadOutput:
        """What the backbone gives → `HeadOutput` without parts."""
        tokens = self.tokens_of(output)
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = self.fused(tokens)
            unnormalized = self.embed(pooled)
            return HeadOutput(pooled, F.normalize(unnormalized), unnormalized=unnormalized)

    def tokens_of(self, output: Tensor | Tokens) -> Tensor:
        """(B,1+P,C), at least float32: the class token, then the part tokens.

        Raises:
            ValueError: the backbone gives none, or no part tokens and `fuse` needs them.
        """
        if not isinstance(output, Tokens):
            raise InvalidValue(
                f"{type(self).__name__}: the backbone gives a feature map without tokens; a transformer with a class "
                f"token is needed. Set MODEL.HEAD.NAME to EmbeddingHead, or MODEL.BACKBONE.NAME to ViT."
            )
        tokens = output.tokens
        if self.fuse != "class" and tokens.shape[1] == 1:
            raise InvalidValue(
                f"{type(self).__name__}: FUSE is {self.fuse} but the backbone gives no part tokens. Set "
                f"MODEL.BACKBONE.PART_TOKENS (3 for PASS), or FUSE to class."
            )
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32))

    def fused(self, tokens: Tensor) -> Tensor:
        """(B,1+P,C) → (B,C), or (B,2C) for `cat`."""
        whole = tokens[:, 0]
        if self.fuse == "class":
            return whole
        mean = tokens[:, 1:].mean(1)
        return torch.cat([whole, mean], dim=1) if self.fuse == "cat" else (whole + mean) / 2


def _check(key: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise InvalidValue(f"MODEL.HEAD.{key}: {value!r} is unknown; accepted: {', '.join(accepted)}. Change it.")
