"""The configurations of the native prefill kernels, bounded by the caches."""

from __future__ import annotations

from typing import Any

from attnreg import Hardware, Problem, SearchSpace, scores
from attnreg_cpu import build
from attnreg_cpu.product import products_of, takes
from attnreg_cpu.sparse import needs_layout
from attnreg_cpu.variant import ELEMENTS, variants_of

L1_FALLBACK = 32 * 1024
L2_FALLBACK = 512 * 1024
LANES = {"amx": 16, "avx512": 16, "avx2": 8}
REGISTERS = {"avx2": 16, "x86_64": 16}
VECTORS = (1, 2, 3, 4)
PACKS = ("none", "values", "all")  # in the order of the kernels' numbers


def lanes_of(hardware: Hardware) -> int:
    """float32 lanes of the vector registers that the kernels use on this CPU."""
    return LANES.get(hardware.arch, 4)


def preferred_vectors(hardware: Hardware, product: str) -> tuple[int, ...]:
    """Tile widths that are used without tuning, best first: those whose micro-kernel comes nearest to the peak."""
    if product.startswith("amx"):
        return (4, 2)
    if REGISTERS.get(hardware.arch, 32) == 16 or hardware.vendor == "intel":
        return (3, 2)  # on an Emerald Rapids 5 to 10% faster where no mask cuts tiles, and as fast elsewhere
    return (2, 3)  # a Zen 5


def every_shape(problem: Problem, hardware: Hardware) -> list[tuple[int, str]]:
    """(vectors, product) of all micro-kernels that could compute the problem."""
    sums = isinstance(problem.spec.score, scores.Additive)  # no product to speak of
    products = ["fma"] if sums else products_of(problem.dtype, hardware)
    return [(n, way) for way in products for n in VECTORS if takes(way, n, gradients=problem.needs_grad)]


def ready_shapes(problem: Problem, hardware: Hardware) -> list[tuple[int, str]]:
    """Those whose kernels the cache holds: what can run without a compiler."""
    every = every_shape(problem, hardware) if problem.dtype in ELEMENTS else []
    return [shape for shape in every if all(kernel.is_ready() for kernel in variants_of(problem, *shape))]


def kernel_space(problem: Problem, hardware: Hardware) -> SearchSpace:
    """Choices: vectors (registers of query rows in a tile: the shape of the micro-kernel), tiles (such tiles of a work
    item: how work is cut among threads, and how often packed keys are used), block_kv (keys of a run), pack (what is
    copied to dense memory first, of what can be read where it lies) and product (how values are multiplied). Where the
    mask needs a block layout, its blocks: layout_q, layout_kv. Without a compiler, only kernels that lie ready are on
    offer.
    """
    lanes, operand = lanes_of(hardware), 4
    l1 = hardware.caches[0] or L1_FALLBACK
    l2 = hardware.caches[1] or L2_FALLBACK
    width = problem.head_dim + problem.head_dim_v
    # A backward tile holds rows both ways and their gradients; so does a run of keys.
    copies = 3 if problem.needs_grad else 1

    def scores(c: Any) -> int:
        return int(c["block_kv"] * c["vectors"] * lanes * operand)

    def item(c: Any) -> int:
        rows = max(c["tiles"] * c["vectors"] * lanes, c.get("layout_q", 0))
        return int(scores(c) + copies * (rows + c["block_kv"]) * width * operand)

    def near(c: Any) -> bool:
        # AMX writes and reads scores by whole lines, and is not held up by the second cache.
        return bool(scores(c) <= (2 * l1 if c["product"].startswith("amx") else l1))

    def holds_block(c: Any) -> bool:
        return bool(c["block_kv"] >= c.get("layout_kv", 0))

    shapes = _shapes(problem, hardware)
    preferred, product = shapes[0]
    # Rows of other heads lie between the rows of one, so a run of keys falls on few sets of the L1 cache (measured:
    # 17.0 ms against 13.5 packed, 32 heads of 128 under bshd).
    apart = problem.spec.layout != "bhsd" or problem.strides[1] != "contiguous"
    packs = _packs(problem, product)
    pack = packs[-1] if apart else packs[0]
    tiles, block_kv = (8, 192) if product == "amx" else (8 if hardware.vendor == "intel" else 4, 96)
    default: dict[str, Any] = {"vectors": preferred, "tiles": tiles, "block_kv": block_kv}
    default |= {"pack": pack, "product": product}
    choices: dict[str, Any] = {
        "vectors": sorted({vectors for vectors, _ in shapes}),
        "tiles": [1, 2, 4, 8, 16],
        "block_kv": [32, 64, 96, 128, 192, 256, 384],
        "pack": packs,
        "product": list(dict.fromkeys(product for _, product in shapes)),
    }
    if needs_layout(problem):
        choices |= {"layout_q": [32, 64, 96, 128], "layout_kv": [32, 64, 96, 128]}
        default |= {"layout_q": 64, "layout_kv": 64, "block_kv": max(block_kv, 128)}
    # The default must lie in the space of any CPU, however small its caches are.
    while default["tiles"] > 1 and item(default) > l2:
        default["tiles"] //= 2
    changes = [*_promising(shapes, tiles), *({"pack": other} for other in packs if other != pack)]
    return SearchSpace(
        choices=choices,
        default=default,
        constraints=[
            ("the scores of a tile fit in the L1 cache", lambda c: near(c) or c == default),
            ("a work item fits in the L2 cache", lambda c: item(c) <= l2 or c == default),
            ("a run of keys holds a block of the layout", holds_block),
            ("what is split is always copied", lambda c: c["product"] != "amx_bf16x3" or c["pack"] == pack),
            ("its kernels can be compiled or lie ready", lambda c: (c["vectors"], c["product"]) in shapes),
        ],
        seeds=[{**default, **change} for change in changes],
    )


def _shapes(problem: Problem, hardware: Hardware) -> list[tuple[int, str]]:
    """(vectors, product) on offer, the default first."""
    most = max(1, -(-problem.sq * problem.group // lanes_of(hardware)))
    every = every_shape(problem, hardware)
    product = every[0][1]
    if build.lacking():
        every = ready_shapes(problem, hardware) or every
    # A tile that is wider than the rows wastes lanes; it is taken where nothing narrower lies ready.
    fitting = [shape for shape in every if shape[0] <= max(most, min(every)[0])]
    preferred = preferred_vectors(hardware, product)
    # Every core should have a tile (measured on two: 0.64 against 0.87 ms, 32 query heads on one KV head).
    of_a_core = max(1, int(problem.sq * problem.q_heads * problem.sequences) // (lanes_of(hardware) * hardware.cores))
    best = min(preferred[0], max(n for n, _ in fitting), of_a_core)
    order = (best, *preferred, *VECTORS)
    return sorted(fitting, key=lambda shape: (shape[1] != product, order.index(shape[0])))


def _packs(problem: Problem, product: str) -> list[str]:
    """What can be read in place are rows that hold the products' operands: float32, and keys of bfloat16 pairs."""
    if problem.dtype == "float32":
        return list(PACKS)
    return list(PACKS[2:] if product == "fma" else PACKS[1:])


def _promising(shapes: list[tuple[int, str]], tiles: int) -> list[dict[str, Any]]:
    """Changes of the default, which has so many tiles, that are tried first."""
    preferred, product = shapes[0]
    changes: list[dict[str, Any]] = [{}]
    if product == "amx":
        changes += [{"tiles": 16}, {"tiles": 4, "block_kv": 256}, {"tiles": 2, "block_kv": 128}]
        return [*changes, {"tiles": 16, "vectors": 2, "block_kv": 256}]
    other = 3 if preferred == 2 else 2
    changes += [
        {"vectors": other, "block_kv": 192},
        {"tiles": 4 if tiles == 8 else 8},
        {"tiles": 2, "block_kv": 128},
        {"vectors": other},
    ]
    split = [n for n, way in shapes if way == "amx_bf16x3"]
    if split:
        changes.insert(1, {"product": "amx_bf16x3", "vectors": min(2, max(split)), "tiles": 16, "block_kv": 256})
    return changes
