"""Field names and true cardinalities of the paper's three click logs.

Source: the processing code of arXiv 2311.15578 (PKU-DAIR/Hetu, tools/EmbeddingMemoryCompression, models/load_data.py);
they sum to the feature counts of the paper's Table 4. Company is private: only these numbers are known, its fields
have no names.
"""
from __future__ import annotations

#: data set -> (field names, cardinalities), in column order
FIELDS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "criteo": (
        tuple(f"C{i}" for i in range(1, 27)),
        (
            1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194,
            27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
        ),
    ),
    "avazu": (
        (
            "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain",
            "app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type",
            "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21",
        ),
        (
            240, 7, 7, 4_737, 7_745, 26, 8_552, 559, 36, 2_686_408, 6_729_486, 8_251, 5, 4, 2_626, 8, 9,
            435, 4, 68, 172, 60,
        ),
    ),
    "company": (
        tuple(f"F{i}" for i in range(1, 44)),
        (
            37, 18, 38, 152, 478, 1_815, 1_507, 425, 3_674, 8_167, 22_630, 30_288, 29_404, 31_470, 31_040,
            31_723, 35_042, 36_521, 37_026, 38_564, 52_159, 63_179, 83_974, 114_654, 186_164, 263_849,
            385_482, 525_793, 775_702, 1_026_970, 1_440_239, 1_878_357, 2_688_273, 3_211_288, 3_921_763,
            4_497_579, 5_254_235, 5_770_186, 6_370_016, 6_709_860, 7_010_166, 6_934_495, 6_597_625,
        ),
    ),
}

#: samples of each log (paper, Table 4)
ROWS = {"criteo": 45_840_617, "avazu": 40_428_967, "company": 35_682_429}
