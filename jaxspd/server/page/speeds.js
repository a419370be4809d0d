// How much of the work is done on coarse grids.

const grown = { progressive_mode: "dct_rewind", progressive_respace: true };

export const SPEEDS = {
  exact: { progressive_mode: "fullres" },
  high: { ...grown, progressive_levels: 1, progressive_delta: 0.01 },
  fast: { ...grown, progressive_levels: 1, progressive_delta: 0.05 },
  fastest: { ...grown, progressive_levels: 2, progressive_delta: 0.1 },
};

export const DEFAULT = "fast";
