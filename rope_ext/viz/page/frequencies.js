"use strict";
// The formulas of rope_ext.frequencies and rope_ext.cos_sin. Frequencies are float32, with the models'
// order of operations: f32 rounds to float32.

const f32 = Math.fround;
const TURN = 2 * Math.PI;

// base^(2 i / R) for each pair i: R / 2 numbers
function powers(base, channels) {
  return Array.from({ length: channels / 2 }, (_, i) =>
    f32(Math.pow(f32(base), f32((2 * i) / channels))));
}

function growth(factor, scale) {
  return factor <= 1 ? 1 : 0.1 * scale * Math.log(factor) + 1;
}

// Each method: settings -> { inverse: inv_freq, radians a token, R / 2 of them; scaling: of cos and sin }
// Settings: base, channels (R), factor, trained (tokens), and the parameters yarn and llama3.
const METHODS = {
  // RoFormer, arXiv 2104.09864, 3.2.2
  default({ base, channels }) {
    return { inverse: powers(base, channels).map((power) => f32(1 / power)), scaling: 1 };
  },

  // position interpolation, arXiv 2306.15595, equation 4
  linear(settings) {
    const inverse = METHODS.default(settings).inverse.map((w) => f32(w / f32(settings.factor)));
    return { inverse, scaling: 1 };
  },

  // NTK-aware scaling, arXiv 2309.00071, 3.1
  ntk({ base, channels, factor }) {
    const stretched = base * Math.pow(factor, channels / (channels - 2));
    return METHODS.default({ base: stretched, channels });
  },

  // YaRN, arXiv 2309.00071, definitions 1 and 2, 3.4
  yarn({ base, channels, factor, trained, yarn = {} }) {
    const pairThatTurns = (times) =>
      (channels * Math.log(trained / (times * TURN))) / (2 * Math.log(base));
    let low = pairThatTurns(yarn.beta_fast ?? 32);
    let high = pairThatTurns(yarn.beta_slow ?? 1);
    if (yarn.truncate ?? true) [low, high] = [Math.floor(low), Math.ceil(high)];
    [low, high] = [Math.max(low, 0), Math.min(high, channels - 1)];
    if (low === high) high += 0.001;
    const inverse = powers(base, channels).map((power, i) => {
      const ramp = f32(f32(i - f32(low)) / f32(high - low));
      const kept = f32(1 - Math.min(Math.max(ramp, 0), 1));
      const slow = f32(f32(1 / f32(f32(factor) * power)) * f32(1 - kept));
      return f32(slow + f32(f32(1 / power) * kept));
    });
    const { mscale, mscale_all_dim: all } = yarn;
    const computed = mscale && all ? growth(factor, mscale) / growth(factor, all) : growth(factor, 1);
    return { inverse, scaling: yarn.attention_factor ?? computed };
  },

  // Llama 3.1, meta-llama/llama-models, models/llama3/model.py
  llama3(settings) {
    const { factor, trained, llama3 } = settings;
    const { low_freq_factor: low, high_freq_factor: high } = llama3;
    const inverse = METHODS.default(settings).inverse.map((w) => {
      const wavelength = f32(f32(TURN) / w);
      const slow = f32(w / f32(factor));
      if (wavelength > f32(trained / low)) return slow;
      if (wavelength < f32(trained / high)) return w;
      const share = f32(f32(f32(trained / wavelength) - f32(low)) / f32(high - low));
      return f32(f32(f32(f32(1 - share) * w) / f32(factor)) + f32(share * w));
    });
    return { inverse, scaling: 1 };
  },
};

// [cos, sin] of position * frequency. The product needs up to 55 bits: position is split, so that both
// products are exact, and the angle addition formulas combine the parts.
function turn(position, frequency) {
  const high = 65536 * Math.floor(position / 65536);
  const a = high * frequency;
  const b = (position - high) * frequency;
  return [
    Math.cos(a) * Math.cos(b) - Math.sin(a) * Math.sin(b),
    Math.sin(a) * Math.cos(b) + Math.cos(a) * Math.sin(b),
  ];
}

// x (pair i is channels 2 i and 2 i + 1) rotated to a position
function rotated(x, position, { inverse, scaling }) {
  return inverse.flatMap((frequency, i) => {
    const [cos, sin] = turn(position, frequency);
    const [x1, x2] = [x[2 * i], x[2 * i + 1]];
    return [scaling * (x1 * cos - x2 * sin), scaling * (x2 * cos + x1 * sin)];
  });
}

// q · k / √D, each rotated to its own position
function scoreOf(q, k, m, n, frequencies) {
  const [a, b] = [rotated(q, m, frequencies), rotated(k, n, frequencies)];
  return a.reduce((sum, value, i) => sum + value * b[i], 0) / Math.sqrt(a.length);
}
