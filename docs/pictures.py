"""Draw the pictures of the documentation: ``python docs/pictures.py`` writes them into docs/images.

They are SVG that follows the reader's colour scheme, and have a background of their own, so that they can be
read on any page.
"""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"

STYLE = """
svg { --page: #ffffff; --text: #1f2328; --faint: #59636e; --line: #8c959f; --rule: #d1d9e0;
      --client: #ddf4ff; --client-edge: #0969da; --server: #fff1e5; --server-edge: #bc4c00;
      --cipher: #d8f3e3; --cipher-edge: #1a7f37; --plain: #f6f8fa; --plain-edge: #8c959f; }
@media (prefers-color-scheme: dark) {
  svg { --page: #0d1117; --text: #f0f6fc; --faint: #9198a1; --line: #6e7681; --rule: #3d444d;
        --client: #0c2d4f; --client-edge: #4493f8; --server: #3d2410; --server-edge: #f0883e;
        --cipher: #10341f; --cipher-edge: #3fb950; --plain: #212830; --plain-edge: #6e7681; } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--text); }
.small { font-size: 12px; } .faint { fill: var(--faint); } .title { font-weight: 600; font-size: 15px; }
.page { fill: var(--page); } .line { stroke: var(--line); stroke-width: 1.5; fill: none; }
.rule { stroke: var(--rule); stroke-width: 1; } .dashed { stroke-dasharray: 5 4; }
.head { fill: var(--line); }
.client { fill: var(--client); stroke: var(--client-edge); }
.server { fill: var(--server); stroke: var(--server-edge); }
.cipher { fill: var(--cipher); stroke: var(--cipher-edge); }
.plain { fill: var(--plain); stroke: var(--plain-edge); }
"""


class Drawing:
    """An SVG of a width and a height, in pixels."""

    def __init__(self, width: int, height: int, description: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img"><title>{escape(description)}</title><style>{STYLE}</style>'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
            f'<rect class="page" width="{width}" height="{height}" rx="8"/>'
        )
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """Draw a box, with lines of text in its middle."""
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>')
        for index, line in enumerate(lines):
            middle = y + height / 2 + 5 + (index - (len(lines) - 1) / 2) * 17
            self.text(x + width / 2, middle, line, "small" if index else "", "middle")

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write one line, whose baseline is at ``y``."""
        self._parts.append(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], kind: str = "", both: bool = False) -> None:
        """Draw an arrow along points."""
        path = " ".join(f"{x} {y}" for x, y in points)
        start = ' marker-start="url(#head)"' if both else ""
        self._parts.append(f'<path class="line {kind}" d="M{path}" marker-end="url(#head)"{start}/>')

    def rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a thin dashed line."""
        self._parts.append(f'<path class="rule dashed" d="M{x1} {y1} {x2} {y2}"/>')

    def __str__(self) -> str:
        """Return the file's text."""
        return "\n".join([self._head, *self._parts, "</svg>\n"])


def lanes(drawing: Drawing, height: int, middle: int, left: str, right: str) -> None:
    """Draw the heads of the client's and the server's half."""
    drawing.rule(middle, 16, middle, height - 16)
    drawing.text(24, 32, "Client", "title")
    drawing.text(24, 50, left, "small faint")
    drawing.text(middle + 24, 32, "Server", "title")
    drawing.text(middle + 24, 50, right, "small faint")


def one_pass() -> Drawing:
    """Draw one pass through a whole model."""
    d = Drawing(780, 426, "One pass through a whole model: what the client does, and what the server does")
    lanes(d, 426, 390, "text, secret key, embeddings, output embedding", "weights, evaluation keys")
    d.box(40, 72, 270, 34, "client", "tokenizer, embeddings")
    d.box(40, 134, 270, 34, "client", "encrypt hidden states")
    d.arrow((175, 106), (175, 134))
    d.box(470, 134, 270, 44, "server", "block 1", "attention, MLP, norms")
    d.arrow((310, 151), (470, 151))
    d.text(390, 143, "ciphertexts", "small", "middle")
    d.box(470, 204, 270, 34, "server", "block 2 … block n")
    d.arrow((605, 178), (605, 204))
    d.box(470, 264, 270, 34, "cipher", "encrypted KV cache")
    d.arrow((605, 238), (605, 264), both=True)
    d.box(40, 204, 270, 44, "client", "refresh", "decrypt and encrypt what is masked")
    d.arrow((470, 214), (310, 214), kind="dashed")
    d.arrow((310, 236), (470, 236), kind="dashed")
    d.text(390, 207, "out of levels", "small", "middle")
    d.text(390, 253, "levels are back", "small", "middle")
    d.box(40, 300, 270, 34, "client", "decrypt hidden states")
    d.arrow((605, 298), (605, 317), (310, 317))
    d.text(390, 310, "ciphertexts", "small", "middle")
    d.box(40, 362, 270, 40, "client", "next token", "last norm, output embedding, sampling")
    d.arrow((175, 334), (175, 362))
    d.arrow((40, 382), (22, 382), (22, 89), (40, 89))
    return d


def refresh() -> Drawing:
    """Draw a masked refresh."""
    d = Drawing(
        780, 340, "Interactive bootstrapping: the server masks, the client encrypts anew, the server unmasks"
    )
    lanes(d, 340, 330, "secret key", "a random r for each refresh, used once")

    def ciphertext(x: int, y: int, width: int, level: int, *lines: str) -> None:
        d.box(x, y, width, 48, "cipher", *lines)
        for index in range(8):
            kind = "cipher" if index < level else "plain"
            d.box(x + width + 8, y + 42 - index * 6, 14, 4, kind)

    ciphertext(420, 70, 290, 1, "Enc(m), level 1", "too few levels for the next operation")
    d.arrow((440, 118), (440, 146))
    d.text(452, 137, "add r, and a fresh encryption of zero", "small")
    ciphertext(420, 148, 290, 1, "Enc(m + r), level 1", "uniformly random, whatever m is")
    d.arrow((420, 172), (300, 172))
    d.box(24, 148, 276, 48, "client", "decrypt: m + r says nothing of m", "encrypt it anew, at level 8")
    d.arrow((162, 196), (162, 270), (420, 270))
    ciphertext(
        420, 246, 290, 8, "Enc(m + r) − r = Enc(m), level 8", "fresh, with levels for the next operations"
    )
    d.text(24, 304, "The client sees a random number;", "small faint")
    d.text(24, 320, "the server sees ciphertexts.", "small faint")
    return d


def packing() -> Drawing:
    """Draw where numbers lie in the slots, for a prompt and for one token."""
    d = Drawing(780, 350, "Packing: a prompt has tokens side by side, one token has its features repeated")
    d.text(24, 34, "Prefill: up to 8 tokens in one ciphertext", "title")
    d.text(
        24,
        54,
        "slot 8·f + t holds feature f of token t; width 768 is padded to 1024, so 8,192 slots are full",
        "small faint",
    )
    kinds = ("cipher", "server", "client", "plain")
    for block, feature in enumerate(("feature 0", "feature 1", "feature 2", "…", "feature 1023")):
        x = 24 + block * 148
        d.text(x + 68, 78, feature, "small", "middle")
        for token in range(8):
            d.box(x + token * 17, 86, 16, 28, kinds[min(token, 3)] if feature != "…" else "plain")
            if feature != "…":
                d.text(x + token * 17 + 8, 105, str(token), "small", "middle")
    d.text(
        24,
        136,
        "A product with a matrix costs the same for one token as for eight.",
        "small",
    )
    d.rule(24, 158, 756, 158)
    d.text(24, 188, "Decode: one token, repeated", "title")
    d.text(24, 208, "slot f holds feature f, and the 1,024 slots repeat 8 times", "small faint")
    for copy in range(8):
        x = 24 + copy * 92
        d.box(x, 222, 88, 28, "cipher", "token t")
        d.text(x + 44, 268, f"part {copy + 1} of 8", "small faint", "middle")
    d.text(
        24,
        296,
        "Each copy meets an eighth of a matrix's diagonals; a sum over the copies ends the product.",
        "small",
    )
    d.text(
        24,
        314,
        "Cached keys and values lie in groups of 8 tokens, one token a copy: one product scores a group.",
        "small",
    )
    return d


def generation() -> Drawing:
    """Draw prefill and decode, and what is in the cache."""
    d = Drawing(780, 300, "Prefill and decode: a prompt in chunks of eight tokens, then one pass a token")
    d.text(24, 34, "Passes", "title")
    d.text(24, 168, "KV cache at the server", "title")
    d.box(24, 50, 130, 58, "plain", "public prefix", "computed once")
    d.text(374, 34, "prefill: up to 8 tokens a pass", "small", "middle")
    for chunk in range(2):
        left = 172 + chunk * 206
        for token in range(8):
            d.box(left + token * 24, 50, 22, 58, "cipher")
            d.text(left + token * 24 + 11, 84, str(8 * chunk + token + 1), "small", "middle")
        d.text(left + 95, 128, "a pass", "small", "middle")
    d.arrow((364, 79), (378, 79))
    d.text(680, 34, "decode: a token a pass", "small", "middle")
    for token in range(3):
        x = 588 + token * 58
        d.arrow((x - (18 if token else 14), 79), (x, 79))
        d.box(x, 50, 40, 58, "cipher", str(token + 17))
        d.text(x + 20, 128, "a pass", "small", "middle")
    d.text(752, 84, "…")
    d.box(24, 184, 130, 44, "plain", "keys, values", "plaintext")
    d.box(172, 184, 190, 44, "cipher", "group 1: tokens 1 to 8", "one ciphertext a layer")
    d.box(378, 184, 190, 44, "cipher", "group 2: tokens 9 to 16", "one ciphertext a layer")
    d.box(588, 184, 168, 44, "cipher", "group 3: from 17 on", "filled as tokens come")
    d.text(
        24,
        258,
        "Each pass evaluates its own tokens only, and multiplies their queries with each group of",
        "small",
    )
    d.text(
        24,
        276,
        "cached keys. Its time grows with the groups; matrices and most polynomials cost the same.",
        "small",
    )
    return d


def sink() -> Drawing:
    """Draw which parts of attention are encrypted."""
    d = Drawing(
        780, 330, "Attention behind a public prefix: plaintext keys for the prefix, ciphertexts for the text"
    )
    d.text(24, 34, "Scores of encrypted queries", "title")
    left, top, cell = 120, 84, 30
    d.text(left + 2.5 * cell, 62, "public prefix", "small", "middle")
    d.text(left + 2.5 * cell, 78, "plaintext keys", "small faint", "middle")
    d.text(left + 8.5 * cell, 62, "private text", "small", "middle")
    d.text(left + 8.5 * cell, 78, "encrypted keys", "small faint", "middle")
    for query in range(6):
        d.text(left - 12, top + query * cell + 20, f"query {query + 1}", "small", "end")
        for key in range(5 + 1 + query):
            x = left + key * cell + (8 if key >= 5 else 0)
            d.box(x, top + query * cell, cell - 3, cell - 3, "plain" if key < 5 else "cipher")
    x = 500
    d.box(x, 84, 22, 22, "plain")
    d.text(x + 32, 100, "plaintext matrix × ciphertext")
    d.box(x, 116, 22, 22, "cipher")
    d.text(x + 32, 132, "ciphertext × ciphertext")
    for index, line in enumerate(
        (
            "The first token is an attention sink: its",
            "hidden states are far larger than others,",
            "and polynomials would have to cover that",
            "range. A begin-of-text token or a system",
            "prompt, which everybody knows, takes its",
            "place: keys and values stay plaintext.",
        )
    ):
        d.text(x, 170 + index * 20, line, "small")
    d.text(
        24,
        306,
        "A prefix of 8 tokens or more costs two plaintext matrices a layer, and no slots of the text.",
        "small faint",
    )
    return d


def linear() -> Drawing:
    """Draw one block of the placement of linear layers."""
    d = Drawing(
        780, 400, "Linear layers on the server: four exchanges a block, everything else with the client"
    )
    lanes(
        d, 400, 390, "text, keys, everything but the matrices", "matrices of linear layers, evaluation keys"
    )
    rows = [
        ("norm", "queries, keys, values"),
        ("attention with its KV cache", "attention's output"),
        ("add, norm", "gate and up"),
        ("activation, product", "down"),
    ]
    for index, (local, remote) in enumerate(rows):
        y = 72 + index * 74
        d.box(40, y, 250, 40, "client", local)
        d.box(490, y + 18, 250, 40, "server", remote, "plaintext matrix × ciphertext")
        d.arrow((290, y + 28), (490, y + 28))
        d.arrow((490, y + 48), (165, y + 48), (165, y + 74))
        d.text(390, y + 23, "encrypt", "small", "middle")
        d.text(390, y + 64, "decrypt", "small", "middle")
    d.box(40, 368, 250, 24, "client", "add; next block")
    return d


def placements() -> Drawing:
    """Draw who computes what in each placement."""
    d = Drawing(780, 330, "Three placements: which parts of a model the server computes on ciphertexts")
    layers = [("output embedding", "output"), ("MLP: linear layers", "linear"), ("MLP: activation", "other")]
    layers += [("attention: linear layers", "linear"), ("attention: scores, softmax", "other")]
    layers += [("norms", "other"), ("embeddings", "output")]
    columns: list[tuple[str, str, Callable[[str, str], bool]]] = [
        ("whole model", "text and weights are hidden", lambda _, kind: kind != "output"),
        ("linear layers", "text is hidden", lambda _, kind: kind == "linear"),
        ("a single module", "text is hidden", lambda name, _: name.startswith("attention")),
    ]
    for column, (title, subtitle, remote) in enumerate(columns):
        x = 24 + column * 250
        d.text(x + 116, 34, title, "title", "middle")
        d.text(x + 116, 53, subtitle, "small faint", "middle")
        for row, (name, kind) in enumerate(layers):
            d.box(x, 66 + row * 31, 232, 27, "server" if remote(name, kind) else "client", name)
    d.box(24, 296, 18, 18, "server")
    d.text(50, 310, "on the server, on ciphertexts", "small")
    d.box(274, 296, 18, 18, "client")
    d.text(300, 310, "with the client", "small")
    return d


def pictures() -> Iterator[tuple[str, Drawing]]:
    """Yield the name and the drawing of every picture."""
    yield "placements", placements()
    yield "pass", one_pass()
    yield "refresh", refresh()
    yield "packing", packing()
    yield "generation", generation()
    yield "sink", sink()
    yield "linear", linear()


if __name__ == "__main__":
    for name, drawing in pictures():
        (IMAGES / f"{name}.svg").write_text(str(drawing), encoding="utf-8")
