"""torch's blockwise FP8 product (cuBLASLt, Hopper only), timed by CUDA's own clock."""

from typing import Any


def block_product_ms(M: int, N: int, K: int, sets: int, repeats: int, groups: int = 1) -> float | str:
    """Milliseconds of a product [M, K] x [N, K] with scales of 1 x 128 and 128 x 128, the best of `repeats` means over
    `sets` operands; or why there are none. With `groups` a product for each of them, M / groups rows long, one after
    the other: torch has none of groups with scales of blocks.
    """
    try:
        import torch
    except ImportError:
        return 'torch is not installed'
    functional: Any = torch.nn.functional
    if not torch.cuda.is_available() or not hasattr(functional, 'scaled_mm'):
        return f'torch {torch.__version__} has no CUDA device or no scaled_mm'
    recipes = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128
    blocks = -(-K // 128)
    whole = -(-blocks // 4) * 4  # cuBLASLt wants scales of a weight padded along K

    def drawn(rows: int) -> Any:
        return torch.randn(rows, K, device='cuda').clamp(-4, 4).to(torch.float8_e4m3fn)

    def operands() -> tuple[Any, ...]:
        a_scale = torch.rand(blocks, M // groups, device='cuda').t()  # rows are neighbours in memory
        b_scale = torch.rand(-(-N // 128), whole, device='cuda').t()
        return drawn(M // groups), drawn(N).t(), a_scale, b_scale

    every = [operands() for _ in range(sets * groups)]

    def run() -> None:
        for a, b, a_scale, b_scale in every:
            functional.scaled_mm(a, b, a_scale, recipes[0], b_scale, recipes[1], output_dtype=torch.bfloat16)

    try:
        run()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f'torch {torch.__version__} refuses: {str(error).splitlines()[0]}'
    best = float('inf')
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / sets)
    every.clear()
    torch.cuda.empty_cache()
    return best
