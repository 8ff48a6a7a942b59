"""Writes csrc/formats/dynamic_map.h: the signed 8-bit dynamic map of bitsandbytes (Dettmers 2016, arXiv:1511.04561), to
the last bit as its create_dynamic_map makes it. Needs the extra `parity`: python tests/golden/make_dynamic_map.py"""

from pathlib import Path

import numpy as np
from bitsandbytes.functional import create_dynamic_map

TARGET = Path(__file__).resolve().parents[2] / "csrc" / "formats" / "dynamic_map.h"


def main() -> None:
    values = create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8).numpy()
    assert values.dtype == np.float32 and values.shape == (256,)
    words = [f"{value:.9g}" for value in values.tolist()]  # nine digits give every float32 back
    words = [f"{word}{'' if '.' in word or 'e' in word else '.0'}f" for word in words]
    rows = ["    " + ", ".join(words[i : i + 8]) + "," for i in range(0, 256, 8)]
    TARGET.write_text(
        "/* dynamic_map.h: the signed 8-bit dynamic map of bitsandbytes (Dettmers 2016, arXiv:1511.04561), ascending.\n"
        " * Written by tests/golden/make_dynamic_map.py. */\n"
        "#ifndef QL_FORMAT_DYNAMIC_MAP_H\n#define QL_FORMAT_DYNAMIC_MAP_H\n\n"
        "static const float ql_dynamic_map[256] = {\n" + "\n".join(rows) + "\n};\n\n#endif\n"
    )


if __name__ == "__main__":
    main()
