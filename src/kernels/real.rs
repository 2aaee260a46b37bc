//! The constants of the two types that are computed in. `python tools/minimax.py` derives every one of them, and with `--check` compares them with this file.

// The literals are what `tools/minimax.py` prints and compares, also where one of them rounds to a known constant.
#![allow(clippy::approx_constant)]

use crate::array::Float;

/// The part of 1/ln 2 = log2 e that a float64 holds, and the rest.
pub const LOG2_E: [f64; 2] = [1.442_695_040_888_963_4, 2.035_527_374_093_103_3e-17];

/// What [`super::math`] needs to know of a float type.
pub trait Real: Float {
    /// 1.5·2^(digits − 1): a sum with it is rounded to an integer, of either sign.
    const MAGIC: Self;
    /// 2^(digits − 1): from here on numbers are whole, and neighbours differ by one.
    const WHOLE: Self;
    /// As long as |x·scale| is at most this, x·log2 e is on the grid of [`Real::MAGIC`] and the reduction keeps its accuracy.
    const LIMIT: Self;
    /// The maximum's exponential is about 2^(BIAS − 1): so much below it is lost to underflow later, and sums have 2^100 to spare.
    const BIAS: Self;
    /// Nats. What is this much or more below the maximum has an exponential of exactly 0, also relative to the biased reference.
    const CLAMP: Self;
    /// Arguments of `exp` at and beyond these give 0 and infinity.
    const EXP_RANGE: [Self; 2];
    /// `2^r = 1 + r·(c0 + c1·r + …)` for r in [−1/2, 1/2] and a little.
    const EXP2: &'static [Self];
    /// The same for r in [−1/16, 1/16] and a little: eight steps per octave.
    const EXP2_8: &'static [Self];
    /// The same for r in [−1/32, 1/32] and a little: sixteen.
    const EXP2_16: &'static [Self];
    /// 2^(j/16).
    const OCTAVE: [Self; 16];
    /// `2^(r + LEAD) = c0 + c1·r + … + r^n` for r as in `EXP2`: of the form that has one multiplication less.
    const LED: &'static [Self];
    /// Whole steps, so many that the last coefficient is about one: what is looked up makes up for them.
    const LEAD: Self;
    /// The same for r as in `EXP2_8`.
    const LED_8: &'static [Self];
    /// See there.
    const LEAD_8: Self;
    /// The bias of its exponents.
    const EXPONENT_BIAS: Self;
    /// `e^r − 1 = r + r²·(c0 + c1·r + …)` for |r| <= ln(2)/2 and a little.
    const EXPM1: &'static [Self];
    /// ln 2 in two parts.
    const LN2: [Self; 2];
    /// `tanh(x)/x = 1 + z·(c0 + c1·z + …)`, z = x², for |x| up to 5/8.
    const TANH: &'static [Self];
    /// Between these c^−24 (f32: c^−10) and its multiples are normal numbers, and so are the squares of what is near.
    const CAPS: [f64; 2];
    /// `(2·atanh(s) − 2s)/s = z·(c0 + c1·z + …)`, z = s², for (1+s)/(1−s) in [sqrt(1/2), sqrt(2)].
    const LOG: &'static [Self];
}

/// From here on a factor of exponentials, or of a dense stream, is so large that what it makes may not fit float32 although the result does, or that
/// there may be nothing but the difference of two infinities.
pub const HIGH: f64 = f64::from_bits((1023 + 70) << 52);

impl Real for f32 {
    const MAGIC: f32 = 12_582_912.0;
    const WHOLE: f32 = 8_388_608.0;
    const LIMIT: f32 = 131_072.0;
    const BIAS: f32 = 48.0;
    // 150·log2 e = 216.4: with the bias, 2^-193. The smallest subnormal is 2^-149.
    const CLAMP: f32 = 150.0;
    // Below exp(-104) < 2^-150, above exp(88.73) > 2^128; both with n inside what `exp_full` can scale by.
    const EXP_RANGE: [f32; 2] = [-104.0, 88.73];
    // Error 2^-28.2.
    const EXP2: &'static [f32] = &[0.693_147_2, 0.240_226_48, 0.055_503_584, 0.009_618_503, 0.001_339_166_5, 0.000_153_288_23];
    // Error 2^-31.8.
    const EXP2_8: &'static [f32] = &[0.693_147_2, 0.240_226_52, 0.055_508_66, 0.009_614_754];
    // Error 2^-28.6.
    const EXP2_16: &'static [f32] = &[0.693_147_2, 0.240_236_34, 0.055_502_795];
    const OCTAVE: [f32; 16] = [
        1.0,
        1.044_273_7,
        1.090_507_7,
        1.138_788_6,
        1.189_207_1,
        1.241_857_8,
        1.296_839_6,
        1.354_255_6,
        1.414_213_5,
        1.476_826_2,
        1.542_210_8,
        1.610_490_3,
        1.681_792_9,
        1.756_252_2,
        1.834_008_1,
        1.915_206_6,
    ];
    // No whole number of octaves is near enough.
    const LED: &'static [f32] = &[];
    const LEAD: f32 = 0.0;
    // Error 2^-27.4.
    const LED_8: &'static [f32] = &[98.701_49, 68.414_66, 23.710_735, 5.479_89];
    const LEAD_8: f32 = 6.625;
    const EXPONENT_BIAS: f32 = 127.0;
    // Error 2^-31.1.
    const EXPM1: &'static [f32] = &[0.5, 0.166_666_66, 0.041_666_493, 0.008_333_544, 0.001_393_234, 0.000_197_634_3];
    const LN2: [f32; 2] = [0.693_147_2, -1.904_654_2e-9];
    // Error 2^-27.6.
    const TANH: &'static [f32] = &[-0.333_332_93, 0.133_316_55, -0.053_753_957, 0.020_678_341, -0.005_743_253];
    const CAPS: [f64; 2] = [1e-3, 1e3];
    // Error 2^-30.2.
    const LOG: &'static [f32] = &[0.666_667_76, 0.399_775_74, 0.298_712_34];
}

impl Real for f64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0;
    const WHOLE: f64 = 4_503_599_627_370_496.0;
    const LIMIT: f64 = 1_073_741_824.0;
    const BIAS: f64 = 80.0;
    // 1100·log2 e = 1586.96: with the bias, 2^-1563. The smallest subnormal is 2^-1074.
    const CLAMP: f64 = 1100.0;
    // Below exp(-745.2) < 2^-1075, above exp(709.79) > 2^1024.
    const EXP_RANGE: [f64; 2] = [-745.2, 709.79];
    // Error 2^-57.8.
    const EXP2: &'static [f64] = &[
        0.693_147_180_559_945_3,
        0.240_226_506_959_101_08,
        0.055_504_108_664_821_72,
        0.009_618_129_107_601_606,
        0.001_333_355_814_654_634_8,
        0.000_154_035_304_490_337_88,
        1.525_273_363_396_419_2e-5,
        1.321_543_883_742_411_3e-6,
        1.017_816_004_253_889_3e-7,
        7.073_232_741_710_745e-9,
        4.438_863_668_251_310_5e-10,
    ];
    // No level looks up eight steps of this type.
    const EXP2_8: &'static [f64] = &[];
    // Error 2^-57.0.
    const EXP2_16: &'static [f64] = &[
        0.693_147_180_559_946_8,
        0.240_226_506_959_099_06,
        0.055_504_108_652_166,
        0.009_618_129_112_225_943,
        0.001_333_381_829_430_772_1,
        0.000_154_033_460_490_076_5,
    ];
    const OCTAVE: [f64; 16] = [
        1.0,
        1.044_273_782_427_413_8,
        1.090_507_732_665_257_7,
        1.138_788_634_756_691_6,
        1.189_207_115_002_721,
        1.241_857_812_073_484,
        1.296_839_554_651_009_6,
        1.354_255_546_936_892_7,
        1.414_213_562_373_095_1,
        1.476_826_145_939_499_3,
        1.542_210_825_407_940_7,
        1.610_490_331_949_254_3,
        1.681_792_830_507_429,
        1.756_252_160_373_299_5,
        1.834_008_086_409_342_4,
        1.915_206_561_397_147_4,
    ];
    // Error 2^-55.3.
    const LED: &'static [f64] = &[
        2_147_483_648.0,
        1_488_522_235.909_785_7,
        515_882_495.510_83,
        119_194_165.754_547_4,
        20_654_774.982_841_235,
        2_863_359.808_221_882,
        330_788.298_659_994_7,
        32_755.003_160_897_075,
        2_837.988_787_056_792,
        218.544_008_892_422_1,
        15.198_158_497_293_486,
    ];
    const LEAD: f64 = 31.0;
    const LED_8: &'static [f64] = &[];
    const LEAD_8: f64 = 0.0;
    const EXPONENT_BIAS: f64 = 1023.0;
    // Error 2^-61.5.
    const EXPM1: &'static [f64] = &[
        0.5,
        0.166_666_666_666_666_77,
        0.041_666_666_666_666_7,
        0.008_333_333_333_321_808,
        0.001_388_888_888_887_745,
        0.000_198_412_698_851_689_65,
        2.480_158_731_734_164_7e-5,
        2.755_724_544_585_924_7e-6,
        2.755_729_614_222_284e-7,
        2.510_855_564_494_173_2e-8,
        2.090_382_972_583_046e-9,
    ];
    const LN2: [f64; 2] = [0.693_147_180_559_945_3, 2.319_046_813_846_299_6e-17];
    // Error 2^-58.8.
    const TANH: &'static [f64] = &[
        -0.333_333_333_333_333_26,
        0.133_333_333_333_312_15,
        -0.053_968_253_966_685_27,
        0.021_869_488_482_671_205,
        -0.008_863_234_498_641_716,
        0.003_592_115_589_581_911_4,
        -0.001_455_735_003_715_830_7,
        0.000_589_486_816_410_394_3,
        -0.000_237_103_145_303_355_43,
        9.171_343_343_858_29e-5,
        -3.034_180_559_139_204_6e-5,
        6.111_288_722_059_58e-6,
    ];
    const CAPS: [f64; 2] = [1e-12, 1e12];
    // Error 2^-59.0.
    const LOG: &'static [f64] = &[
        0.666_666_666_666_671,
        0.399_999_999_995_413_9,
        0.285_714_287_208_589_9,
        0.222_222_002_387_713_75,
        0.181_835_008_991_620_42,
        0.153_151_757_247_069_7,
        0.147_889_688_258_906_4,
    ];
}
