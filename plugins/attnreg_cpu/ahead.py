"""Compile kernels before they are needed, for images and machines that have no compiler at run time.

There, what lies in the cache serves if it was built on the same CPU by the same release, whatever compiler made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from attnreg import Hardware, errors
from attnreg_cpu import build
from attnreg_cpu.decode import CACHES
from attnreg_cpu.product import of_gradients, products_of, takes
from attnreg_cpu.tuning_space import VECTORS, preferred_vectors
from attnreg_cpu.variant import ELEMENTS, Variant

HEAD_DIMS = (64, 96, 128)
DTYPES = ("float32", "bfloat16", "float16")

Said = Callable[[str], None]


def build_all(
    hardware: Hardware,
    head_dims: Sequence[int] = HEAD_DIMS,
    dtypes: Sequence[str] = DTYPES,
    *,
    gradients: bool = True,
    whole_space: bool = False,
    jobs: int | None = None,
    say: Said = lambda line: None,
) -> int:
    """Compile the decode kernels, and the prefill kernels of these head sizes and dtypes; returns how many there are.

    gradients: the backward kernels too. whole_space: every micro-kernel shape that the tuner may try, not only those
    that are used without tuning. jobs: compilers at once; the usable cores by default. `say` gets a line for each.
    Raises BuildError where the compiler refuses, or where there is none and a library does not lie ready; InputError
    for a dtype that no kernel takes.
    """
    unknown = [dtype for dtype in dtypes if dtype not in ELEMENTS]
    if unknown:
        raise errors.InputError("dtypes", f"expected names out of {', '.join(ELEMENTS)}, got {', '.join(unknown)}")
    work = list(_work(hardware, head_dims, dtypes, gradients, whole_space))

    one_line = Lock()  # print writes a line and its end one after the other

    def one(item: tuple[str, dict[str, int | str]]) -> None:
        source, defines = item
        path = build.build(source, defines)
        said = " ".join(f"{name.removeprefix('ATTNREG_').lower()}={value}" for name, value in defines.items())
        with one_line:
            say(f"{source} {said}: {path}")

    with ThreadPoolExecutor(jobs or hardware.cores) as pool:
        list(pool.map(one, work))
    return len(work)


def _work(
    hardware: Hardware, head_dims: Sequence[int], dtypes: Sequence[str], gradients: bool, whole_space: bool
) -> Iterator[tuple[str, dict[str, int | str]]]:
    for cache in CACHES.values():
        yield "decode.cpp", {"ATTNREG_CACHE": cache}
    for dtype in dtypes:
        products = products_of(dtype, hardware)
        for head_dim in head_dims:
            for product in products if whole_space else products[:1]:
                for vectors in VECTORS if whole_space else preferred_vectors(hardware, product):
                    sources = ["forward.cpp"]
                    # The backward kernel of multiply-adds comes with those.
                    if gradients and takes(product, vectors, gradients=True) and of_gradients(product) == product:
                        sources.append("backward.cpp")
                    for source in sources:
                        yield source, Variant(source, head_dim, head_dim, dtype, vectors, product).defines()
