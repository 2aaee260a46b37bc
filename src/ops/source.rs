//! Where the kernels' operands come from and gradients go when they cannot be read or written in place: logits that are bent by softcap and mask,
//! and strided classes.

use crate::array::{Array, DType, Element, Flags, Float, FromNumber, Out, Span, SpanMut, Vf};
use crate::kernels::bend::{self, Mask, Softcap};
use crate::kernels::copy;
use crate::kernels::finish::{APART, Tile};
use crate::kernels::input::{Masked, Raw};
use crate::kernels::rows;
use crate::kernels::tanh::Cap;
use crate::simd::{Isa, Kernel, Level, Vector};

use super::job::{Job, MASK, OUT, X};
use super::plan::Axes;
use super::scratch::Work;

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

/// `cap·tanh(x/cap)` in place, or the derivative 1 − tanh² there: in float64 where float32 might not hold the cap, or only part of the digits of
/// x/cap.
fn softcap<T: Work>(level: Level, cap: f64, slope: bool, x: &mut [T]) {
    if keeps_its_digits::<T>(cap) {
        let dst = SpanMut::of(x);
        return level.run(Softcap { cap: Cap::new(cap), slope, x: dst.read(), dst, slopes: &mut [] });
    }
    let mut wide = [0.0_f64; rows::BLOCK];
    for x in x.chunks_mut(rows::BLOCK) {
        let wide = &mut wide[..x.len()];
        wide.iter_mut().zip(x.iter()).for_each(|(wide, x)| *wide = x.to_f64());
        let dst = SpanMut::of(&mut *wide);
        level.run(Softcap { cap: Cap::new(cap), slope, x: dst.read(), dst, slopes: &mut [] });
        x.iter_mut().zip(wide.iter()).for_each(|(x, &wide)| *x = T::from_f64(wide));
    }
}

/// Logits capped in place, and the derivatives there into `slopes`, if there is room.
pub(super) fn capped<T: Work>(level: Level, cap: f64, x: &mut [T], slopes: &mut [T]) {
    if keeps_its_digits::<T>(cap) {
        let dst = SpanMut::of(x);
        return bend::cap(level, Cap::new(cap), dst.read(), dst, slopes);
    }
    if !slopes.is_empty() {
        slopes.copy_from_slice(x);
        softcap(level, cap, true, slopes);
    }
    softcap(level, cap, false, x);
}

/// The softcap, if the loops over long rows can do it themselves: of float32, where it is all there is to be done and the exponentials are `kept`, if
/// there is a gradient.
pub(super) fn cap<T: Work>(job: &Job, kept: bool) -> Option<Cap<T>> {
    let fits = T::DTYPE == DType::F32
        && job.level != Level::Scalar
        && kept
        && job.bend.mask.is_none()
        && (!job.terms.dense || job.even() && job.out.is_none());
    job.bend.softcap.filter(|&cap| fits && keeps_its_digits::<T>(cap)).map(Cap::new)
}

/// A run of adjacent elements, forwards or backwards, widened.
struct Line<'s, E, T> {
    src: Span<'s, E>,
    backwards: bool,
    /// How many bytes behind stands what is read next, to be asked for.
    next: isize,
    dst: &'s mut [T],
}

impl<E: Element<Acc = T>, T: Work> Kernel for Line<'_, E, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let Self { src, backwards, next, dst } = self;
        // So that memory works while this run is computed with.
        for i in (0..src.len()).step_by(64 / size_of::<E>()) {
            isa.prefetch(src.address(i).wrapping_offset(next));
        }
        if !backwards {
            return copy::convert(isa, src, SpanMut::of(dst));
        }
        let (step, n) = (Vf::<S, T>::LANES, src.len());
        let mut i = 0;
        while i + step <= n {
            SpanMut::of(&mut *dst).store(isa, i, src.load(isa, n - i - step).reverse());
            i += step;
        }
        for (i, x) in dst.iter_mut().enumerate().skip(i) {
            *x = src.get(n - 1 - i).to_acc();
        }
    }
}

/// Whether the cap, and x/cap, are held well enough by the type.
fn keeps_its_digits<T: Work>(cap: f64) -> bool {
    T::DTYPE == DType::F64 || (1e-30..=1e15).contains(&cap)
}

/// Reads a run of adjacent elements, widened; `offset` is that of the lowest. What is read next stands `next` bytes behind.
pub(super) fn line<T: Work>(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [T]) {
    if !T::line(level, array, offset, backwards, next, dst) {
        let (n, size) = (dst.len(), array.dtype().size() as isize);
        let (first, stride) = if backwards { (offset + (n as isize - 1) * size, -size) } else { (offset, size) };
        array.read(first, stride, n, dst, 1);
    }
}

/// The same of elements `E`, which are computed in `T`.
pub(super) fn line_of<E: Element<Acc = T>, T: Work>(
    level: Level,
    array: &Array,
    offset: isize,
    backwards: bool,
    next: isize,
    dst: &mut [T],
) -> bool {
    level.run(Line { src: array.span::<E>(offset, dst.len()), backwards, next, dst });
    true
}

/// Reads classes `start..` of a row of logits into scratch, as they are.
pub(super) fn unbent<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T]) {
    let base = job.rows.offset(X, row);
    if job.lines && !dst.is_empty() {
        let stride = job.classes.inner_stride(X);
        let lowest = if stride < 0 { start + dst.len() - 1 } else { start };
        // The next block of the row, or the next row.
        let next = if dst.len() == job.classes.size { job.rows.inner_stride(X) } else { dst.len() as isize * stride };
        line(job.level, job.x, base + lowest as isize * stride, stride < 0, next, dst);
    } else {
        gather(job.x, X, &job.classes, base, start, dst, dst.len(), 1);
    }
}

/// Reads classes `start..` of a row of logits into scratch, bent.
pub(super) fn logits<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T]) {
    logits_and_slopes(job, row, start, dst, &mut []);
}

/// The same, and what the softcap did to them into `slopes`, if there is room.
pub(super) fn logits_and_slopes<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T], slopes: &mut [T]) {
    let mask = job.bend.mask.is_some();
    match (adjacent::<T>(job, row, start, dst.len()), job.bend.softcap) {
        (Some(x), None) if mask => return masked(job, row, start, T::NEG_INF, x, SpanMut::of(dst)),
        (x, Some(cap)) if keeps_its_digits::<T>(cap) => {
            if x.is_none() {
                unbent(job, row, start, dst);
            }
            let dst = SpanMut::of(&mut *dst);
            bend::cap(job.level, Cap::new(cap), x.unwrap_or(dst.read()), dst, slopes);
        }
        (_, Some(cap)) => {
            unbent(job, row, start, dst);
            capped(job.level, cap, dst, slopes);
        }
        _ => unbent(job, row, start, dst),
    }
    for (run, to) in [(dst, T::NEG_INF), (slopes, T::ZERO)] {
        let run = SpanMut::of(run);
        masked(job, row, start, to, run.read(), run);
    }
}

/// Classes `start..` of a row where they stand: adjacent, in order and of the type that is computed in.
fn adjacent<'a, T: Work>(job: &Job<'a>, row: usize, start: usize, n: usize) -> Option<Span<'a, T>> {
    let size = size_of::<T>() as isize;
    let there = job.lines && job.x.dtype() == T::DTYPE && job.classes.inner_stride(X) == size && n > 0;
    there.then(|| job.x.span(job.rows.offset(X, row) + start as isize * size, n))
}

/// The mask of classes `start..` of a row where it stands, if it has adjacent truth values.
pub(super) fn adjacent_flags<'a>(job: &Job<'a>, row: usize, start: usize, n: usize) -> Option<Flags<'a>> {
    let mask = job.bend.mask?;
    let there = n > 0 && job.classes.is_line() && (job.classes.size == 1 || job.classes.inner_stride(MASK) == 1);
    if there { mask.flags(job.rows.offset(MASK, row) + start as isize, n) } else { None }
}

/// A row of float32 logits and its mask where both stand, if that is all there is to be done to them. For float64 the loops would be as much code again:
/// it is copied block by block.
pub(super) fn adjacent_masked<'a, T: Work>(job: &Job<'a>, row: usize) -> Option<Raw<'a, T>> {
    let n = job.classes.size;
    if job.bend.softcap.is_some() || T::DTYPE != DType::F32 {
        return None;
    }
    Some(Raw::Masked(Masked { x: adjacent::<T>(job, row, 0, n)?, mask: adjacent_flags(job, row, 0, n)? }))
}

/// Classes `start..` of a row from `x` to `dst`, which may be the same, and `to` for what is under False.
#[inline(never)]
pub(super) fn masked<T: Work>(job: &Job, row: usize, start: usize, to: T, x: Span<T>, dst: SpanMut<T>) {
    let Some(array) = job.bend.mask else { return };
    let mut copy = [0_u8; rows::BLOCK];
    for index in (0..x.len()).step_by(rows::BLOCK) {
        let n = rows::BLOCK.min(x.len() - index);
        let at = start + index;
        let mask = adjacent_flags(job, row, at, n).unwrap_or_else(|| {
            flags(job, array, row, at, &mut copy, n, 1);
            Flags::of(&copy)
        });
        let stride = job.classes.inner_stride(MASK);
        let ahead = array.address(job.rows.offset(MASK, row) + (at + n) as isize * stride);
        job.level.run(Mask { mask, to, x: x.part(index, n), dst: dst.part(index, n), ahead });
    }
}

/// Multiplies gradients of a row in scratch by what bending did to the logits: `slopes`, if they were kept; otherwise it is computed again, before
/// the logits are overwritten.
pub(super) fn unbend<T: Work>(job: &Job, row: usize, start: usize, slopes: &[T], gradient: &mut [T]) {
    if !slopes.is_empty() {
        bend::multiply(job.level, SpanMut::of(gradient), Span::of(slopes));
    } else if let Some(cap) = job.bend.softcap {
        let mut slope = [T::ZERO; rows::BLOCK];
        for (index, gradient) in gradient.chunks_mut(rows::BLOCK).enumerate() {
            let slope = &mut slope[..gradient.len()];
            unbent(job, row, start + index * rows::BLOCK, slope);
            softcap(job.level, cap, true, slope);
            bend::multiply(job.level, SpanMut::of(gradient), Span::of(slope));
        }
    }
    let gradient = SpanMut::of(gradient);
    masked(job, row, start, T::ZERO, gradient.read(), gradient);
}

/// What bending does to the gradient of one logit: a factor, or nothing is left of it.
fn slope_at(job: &Job, row: usize, class: usize) -> Option<f64> {
    let there = |mask: &Array| mask.get::<f32>(job.rows.offset(MASK, row) + job.classes.offset(MASK, class)) != 0.0;
    if !job.bend.mask.is_none_or(there) {
        return None;
    }
    let mut slope = [1.0_f64];
    if let Some(cap) = job.bend.softcap {
        gather(job.x, X, &job.classes, job.rows.offset(X, row), class, &mut slope, 1, 1);
        softcap(job.level, cap, true, &mut slope);
    }
    Some(slope[0])
}

/// The same for the exact values at the maximum and the targets.
pub(super) fn unbend_patches(job: &Job, kept: &[usize], tile: &mut Tile) {
    if !job.bend.is_some() {
        return;
    }
    for (slot, &row) in kept.iter().enumerate() {
        let at = |class: usize, value: &mut f64| *value = slope_at(job, row, class).map_or(0.0, |slope| *value * slope);
        if job.terms.dense && tile.arg[slot] < job.classes.size as f64 {
            at(tile.arg[slot] as usize, &mut tile.top[slot]);
        }
        if let Some(labels) = &job.labels {
            for (j, class, _) in labels.row(row) {
                at(class, &mut tile.patch[j * APART + slot]);
            }
        }
    }
}

/// What there is to be known for that of the sparse targets of a row, before it is overwritten.
pub(super) fn target_slopes(job: &Job, row: usize, slot: usize, slopes: &mut Vec<(usize, Option<f64>)>) {
    if let Some(labels) = &job.labels {
        slopes.extend(labels.row(row).map(|(j, class, _)| (j * APART + slot, slope_at(job, row, class))));
    }
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

/// Reads classes of a row of the mask.
pub(super) fn flags(job: &Job, mask: &Array, row: usize, start: usize, dst: &mut [u8], n: usize, step: usize) {
    job.classes.runs(MASK, start, n, |offset, stride, at, count| {
        mask.read_flags(job.rows.offset(MASK, row) + offset, stride, count, &mut dst[at * step..], step);
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
