//! Where the kernels' operands come from and gradients go when they cannot be read or written in place: logits that are bent by softcap and mask,
//! strided classes, and the dense target stream.

use crate::array::{Array, DType, Float, FromNumber, Out, SpanMut, Vf};
use crate::kernels::finish::{Tile, WIDTH};
use crate::kernels::math::tanh_sech2;
use crate::kernels::rows;
use crate::simd::{Isa, Kernel, Level, Vector};

use super::job::{Job, MASK, OUT, PROBS, X};
use super::plan::Axes;
use super::scratch::{Work, room};

/// What happens to the logits before anything else: they reach the kernels as gathered blocks that are already bent.
#[derive(Clone, Copy, Default)]
pub(super) struct Bend<'a> {
    pub(super) softcap: Option<f64>,
    pub(super) mask: Option<&'a Array<'a>>,
}

impl Bend<'_> {
    pub(super) fn is_some(self) -> bool {
        self.softcap.is_some() || self.mask.is_some()
    }
}

/// `cap·tanh(x/cap)` of a strided run in place, or the derivative 1 − tanh² there.
pub(super) struct Softcap<'a, T> {
    pub(super) cap: f64,
    pub(super) slope: bool,
    pub(super) x: &'a mut [T],
}

impl<T: Work> Kernel for Softcap<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let step = Vf::<S, T>::LANES;
        let cap = Vf::<S, T>::splat(isa, T::from_f64(self.cap));
        let span = SpanMut::of(self.x);
        let mut i = 0;
        while i < span.read().len() {
            let n = step.min(span.read().len() - i);
            let (tanh, sech2) = tanh_sech2(isa, span.read().load_partial(isa, i, n, T::ZERO) / cap);
            span.store_partial(isa, i, n, if self.slope { sech2 } else { tanh * cap });
            i += n;
        }
    }
}

/// Runs [`Softcap`] over a block, in float64 where float32 might not hold the cap, or only part of the digits of x/cap.
fn cap_block<T: Work>(level: Level, cap: f64, slope: bool, x: &mut [T]) {
    if T::DTYPE == DType::F64 || (1e-30..=1e15).contains(&cap) {
        return level.run(Softcap { cap, slope, x });
    }
    let mut wide = [0.0_f64; rows::BLOCK];
    let wide = &mut wide[..x.len()];
    for (wide, x) in wide.iter_mut().zip(x.iter()) {
        *wide = x.to_f64();
    }
    level.run(Softcap { cap, slope, x: &mut *wide });
    for (x, &wide) in x.iter_mut().zip(wide.iter()) {
        *x = T::from_f64(wide);
    }
}

/// Reads classes of a row of logits into scratch, bent.
pub(super) fn gather_logits<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T], n: usize, step: usize) {
    gather(job.x, X, &job.classes, job.rows.offset(X, row), start, dst, n, step);
    if !job.bend.is_some() {
        return;
    }
    let mut block = [T::ZERO; rows::BLOCK];
    if let Some(cap) = job.bend.softcap {
        for i in 0..n {
            block[i] = dst[i * step];
        }
        cap_block(job.level, cap, false, &mut block[..n]);
        for i in 0..n {
            dst[i * step] = block[i];
        }
    }
    if let Some(mask) = job.bend.mask {
        gather(mask, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut block, n, 1);
        for i in (0..n).filter(|&i| block[i] == T::ZERO) {
            dst[i * step] = T::NEG_INF;
        }
    }
}

/// Multiplies gradients of a row in scratch by what bending did to the logits. Read before the logits are overwritten.
pub(super) fn unbend<T: Work>(job: &Job, row: usize, start: usize, gradient: &mut [T], n: usize, step: usize) {
    let mut block = [T::ZERO; rows::BLOCK];
    if let Some(cap) = job.bend.softcap {
        gather(job.x, X, &job.classes, job.rows.offset(X, row), start, &mut block, n, 1);
        cap_block(job.level, cap, true, &mut block[..n]);
        for i in 0..n {
            gradient[i * step] = T::from_f64(gradient[i * step].to_f64() * block[i].to_f64());
        }
    }
    if let Some(mask) = job.bend.mask {
        gather(mask, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut block, n, 1);
        for i in (0..n).filter(|&i| block[i] == T::ZERO) {
            gradient[i * step] = T::ZERO;
        }
    }
}

/// The same for the exact values at the maximum and the targets.
pub(super) fn unbend_patches(job: &Job, kept: &[usize], tile: &mut Tile) {
    if !job.bend.is_some() {
        return;
    }
    for (slot, &row) in kept.iter().enumerate() {
        let at = |class: usize, value: &mut f64| {
            let mut one = [*value];
            unbend::<f64>(job, row, class, &mut one, 1, 1);
            *value = one[0];
        };
        if job.terms.dense && tile.arg[slot] < job.classes.size as f64 {
            at(tile.arg[slot] as usize, &mut tile.top[slot]);
        }
        if let Some(labels) = &job.labels {
            for (j, class, _) in labels.row(row) {
                at(class, &mut tile.patch[j * WIDTH + slot]);
            }
        }
    }
}

/// Share of the target that smoothing gives each class of a row: e over the classes that take part, of the sides that do.
pub(super) fn row_spread(job: &Job, row: usize) -> f64 {
    if job.spread == 0.0 {
        return 0.0;
    }
    let spread = job.spread * job.labels.as_ref().map_or(1.0, |labels| labels.kept_share(row));
    let Some(mask) = job.bend.mask else { return spread };
    let mut block = [0_f32; rows::BLOCK];
    let mut count = 0;
    for start in (0..job.classes.size).step_by(rows::BLOCK) {
        let n = rows::BLOCK.min(job.classes.size - start);
        gather(mask, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut block, n, 1);
        count += block[..n].iter().filter(|&&kept| kept != 0.0).count();
    }
    spread * job.classes.size as f64 / count as f64
}

/// Reads classes of a row into scratch.
#[inline]
pub(super) fn gather<T: FromNumber>(
    array: &Array,
    operand: usize,
    classes: &Axes,
    base: isize,
    start: usize,
    dst: &mut [T],
    n: usize,
    step: usize,
) {
    if classes.is_line() {
        let stride = classes.inner_stride(operand);
        return array.read(base + start as isize * stride, stride, n, dst, step);
    }
    classes.runs(operand, start, n, |offset, stride, at, count| {
        array.read(base + offset, stride, count, &mut dst[at * step..], step);
    });
}

/// Writes classes of a row from scratch.
#[inline]
pub(super) fn scatter<T: Float>(out: &Out, classes: &Axes, base: isize, start: usize, src: &[T], n: usize, step: usize) {
    if classes.is_line() {
        let stride = classes.inner_stride(OUT);
        return out.write(base + start as isize * stride, stride, n, src, step);
    }
    classes.runs(OUT, start, n, |offset, stride, at, count| out.write(base + offset, stride, count, &src[at * step..], step));
}

/// The dense stream T = w·(P·(1 − e) + e/C) of a row, for classes `start..` in `dst[0], dst[step], …`; P = 0 without probabilities.
pub(super) fn dense_row<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T], n: usize, step: usize) {
    if let Some(probs) = job.probs {
        gather(probs, PROBS, &job.classes, job.rows.offset(PROBS, row), start, dst, n, step);
        if job.keep == 1.0 && job.spread == 0.0 && job.weight.is_empty() {
            return;
        }
    }
    let spread = row_spread(job, row);
    let mut mask = [T::ONE; rows::BLOCK];
    if let Some(array) = job.bend.mask {
        gather(array, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut mask, n, 1);
    }
    for i in 0..n {
        let p = if job.probs.is_some() { dst[i * step].to_f64() } else { 0.0 };
        let w = job.weight.get(start + i).copied().unwrap_or(1.0);
        let spread = if mask[i] == T::ZERO { 0.0 } else { spread };
        dst[i * step] = T::from_f64(w * (p * job.keep + spread));
    }
}

/// The dense stream that is the same for every row: `u_c = w_c·e/C`.
pub(super) fn shared_stream<T: Float>(job: &Job, shared: &mut Vec<T>) {
    if job.terms.dense && !job.own_dense() {
        room(shared, job.classes.size);
        for (c, u) in shared[..job.classes.size].iter_mut().enumerate() {
            *u = T::from_f64(job.spread * job.weight.get(c).copied().unwrap_or(1.0));
        }
    }
}
