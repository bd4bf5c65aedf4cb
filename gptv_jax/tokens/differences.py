"""Whether the tokens of two networks mean one thing, as for a draft or a teacher."""

from gptv_jax.model.gpt import Network
from gptv_jax.tokens.codec import Codec


def token_differences(
    given: Network,
    given_codec: Codec | None,
    network: Network,
    codec: Codec | None,
    kinds: tuple[str, str] | None = None,
) -> list[str]:
    """Phrases such as "vocabulary 6, not 5", in which `given` differs from the network.

    A codec is None if its palette or tokenizer is not made yet; then `kinds` alone, the
    config.tokens.kind of both, tell a palette from grey levels. Two numbers of class tokens are
    compared only where both networks have classes.
    """
    pairs = {"kind of tokens": kinds} if kinds else {}
    pairs |= {
        "objective": (given.config.objective, network.config.objective),
        "inputs": (given.config.image_input, network.config.image_input),
        "vocabulary": (given.vocabulary, network.vocabulary),
        "grid": (given.grid, network.grid),
    }
    classes = given.config.class_tokens, network.config.class_tokens
    if all(classes):  # a network without classes is told none
        pairs["classes"] = classes
    if codec and given_codec:
        pairs["image shape"] = given_codec.image_shape, codec.image_shape
    differing = [f"{name} {its}, not {ours}" for name, (its, ours) in pairs.items() if its != ours]
    if not differing and codec and given_codec:
        its, ours = given_codec.definition, codec.definition
        if type(its) is not type(ours) or (ours and not its.equivalent(ours)):
            differing = ["another palette or tokenizer"]
    return differing
