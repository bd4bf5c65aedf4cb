"""The report's figures of clips: numbers by frame."""

from gptv_jax.runs import html, pictures

WAYS = {  # of continuing a clip
    "continued": ("the network", pictures.BLUE),
    "shifted": ("constant velocity", pictures.ORANGE),
    "copied": ("last frame", pictures.QUIET),
}
SCORES = {
    "exact": "share of frames exactly right",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
}


def nats(found: dict, span: int) -> str:
    """The test loss by frame, of the numbers of the stage pretrain; "" without frames.

    Where a token stands for `span` frames, it is the loss by step in time.
    """
    points = _by_frame(found, "test_nats_per_token_of_frame_")
    if not points:
        return ""
    unit = "frame" if span == 1 else f"step of {span} frames"
    png = pictures.plot("test loss, nats per token", unit, [(points, pictures.BLUE)])
    caption = f"Loss by {unit}. It falls as the frames before tell what is there and how it moves."
    return html.figure(png, caption)


def continuations(found: dict) -> str:
    """The scores of continuations by frame, of the numbers of the stage sample; "" without them."""
    if "continued_clips" not in found:
        return ""
    content, caption = "", f"{found['continued_clips']} test clips, continued greedily."
    for score, title in SCORES.items():
        curves = [
            (_by_frame(found, f"{way}_{score}_frame_"), color, label)
            for way, (label, color) in WAYS.items()
        ]
        content += html.figure(pictures.plot(title, "frame", curves), f"{title}: {caption}")
    return content


def _by_frame(found: dict, prefix: str) -> list[tuple[int, float]]:
    """The numbers of the summary whose names are the prefix and a frame."""
    return [(int(k.removeprefix(prefix)), v) for k, v in found.items() if k.startswith(prefix)]
