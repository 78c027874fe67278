"""Published models as a Model."""

from tritonmoe.tools.planner.transformer_model import Attention, LatentAttention, Model

__all__ = ["MODELS"]

MODELS = {
    model.name: model
    for model in (
        Model("Qwen3-30B-A3B", 2048, 48, 0, Attention(32, 4, 128), 128, 8, 768, 0, 6144, 151936),
        Model("Qwen3-235B-A22B", 4096, 94, 0, Attention(64, 4, 128), 128, 8, 1536, 0, 12288, 151936),
        Model("Mixtral-8x7B", 4096, 32, 0, Attention(32, 8, 128), 8, 2, 14336, 0, 14336, 32000),
        Model("OLMoE-1B-7B", 2048, 16, 0, Attention(16, 16, 128), 64, 8, 1024, 0, 1024, 50304),
        Model(
            *("gpt-oss-120b", 2880, 36, 0, Attention(64, 8, 64), 128, 4, 2880, 0, 2880, 201088),
            window=128,
            num_window_layers=18,
        ),
        Model(
            *("gpt-oss-20b", 2880, 24, 0, Attention(64, 8, 64), 32, 4, 2880, 0, 2880, 201088),
            window=128,
            num_window_layers=12,
        ),
        Model("Mixtral-8x22B", 6144, 56, 0, Attention(48, 8, 128), 8, 2, 16384, 0, 16384, 32768),
        Model("GLM-4.5", 5120, 92, 3, Attention(96, 8, 128), 160, 8, 1536, 1536, 12288, 151552),
        Model(
            *("DeepSeek-V2-Lite", 2048, 27, 1, LatentAttention(16, 0, 512, 128, 64, 128)),
            *(64, 6, 1408, 2816, 10944, 102400),
        ),
        Model(
            *("DeepSeek-V2", 5120, 60, 1, LatentAttention(128, 1536, 512, 128, 64, 128)),
            *(160, 6, 1536, 3072, 12288, 102400),
            num_groups=8,
            top_k_groups=3,
        ),
        Model(
            *("DeepSeek-V3", 7168, 61, 3, LatentAttention(128, 1536, 512, 128, 64, 128)),
            *(256, 8, 2048, 2048, 18432, 129280),
            num_groups=8,
            top_k_groups=4,
        ),
        Model(
            *("Kimi-K2", 7168, 61, 1, LatentAttention(64, 1536, 512, 128, 64, 128)),
            *(384, 8, 2048, 2048, 18432, 163840),
        ),
    )
}
