//! The dense target stream: probabilities, and what smoothing adds to them.

use crate::array::{Float, Span};
use crate::kernels::rows;

use super::job::{Job, PROBS};
use super::scratch::{Buffer, Work, room};
use super::source::{flags, gather, line};
use super::strip::Strip;

/// How many of `n` classes from `start` on of a row take part.
#[inline(never)]
pub(super) fn kept_classes(job: &Job, row: usize, start: usize, n: usize) -> usize {
    let Some(mask) = job.bend.mask else { return n };
    let (mut block, mut count) = ([0_u8; rows::BLOCK], 0);
    for from in (start..start + n).step_by(rows::BLOCK) {
        let block = &mut block[..rows::BLOCK.min(start + n - from)];
        let n = block.len();
        flags(job, mask, row, from, block, n, 1);
        // As many as a byte can count.
        count += block.chunks(255).map(|part| usize::from(part.iter().map(|&kept| u8::from(kept != 0)).sum::<u8>())).sum::<usize>();
    }
    count
}

/// What smoothing makes of the target of a row.
#[derive(Clone, Copy, Default)]
pub(super) struct Spread {
    /// Share of each class that takes part: e over their number, of the sides that do.
    pub(super) share: f64,
    /// Classes that take part.
    pub(super) classes: usize,
}

impl Spread {
    /// Where so many classes take part.
    pub(super) fn over(job: &Job, row: usize, classes: usize) -> Self {
        let mut share = 0.0;
        if classes > 0 {
            share = job.spread * job.labels.as_ref().map_or(1.0, |labels| labels.kept_share(row));
        }
        if classes < job.classes.size && classes > 0 {
            share *= job.classes.size as f64 / classes as f64;
        }
        Self { share, classes }
    }
}

/// That of each row of a strip; nothing where nothing is smoothed.
pub(super) fn spreads(strip: &Strip) -> Vec<Spread> {
    let Strip { job, kept, .. } = *strip;
    if job.spread == 0.0 {
        return Vec::new();
    }
    kept.iter().map(|&row| Spread::over(job, row, kept_classes(job, row, 0, job.classes.size))).collect()
}

/// Whether the dense stream is the probabilities themselves.
pub(super) fn is_probs(job: &Job) -> bool {
    job.probs.is_some() && job.keep == 1.0 && job.spread == 0.0 && job.weight.is_empty()
}

/// That of a row, where it stands: adjacent and of the type that is computed in.
pub(super) fn adjacent_probs<'a, T: Work>(job: &Job<'a>, row: usize) -> Option<Span<'a, T>> {
    let probs = job.probs.filter(|probs| is_probs(job) && probs.dtype() == T::DTYPE && job.probs_lie_in_rows)?;
    Some(probs.span(job.rows.offset(PROBS, row), job.classes.size))
}

/// The dense stream T = w·(P·(1 − e) + e/C) of classes `start..` of a row, whose smoothed classes have `spread`; P = 0 without probabilities.
pub(super) fn dense_row<T: Work>(job: &Job, row: usize, spread: f64, start: usize, dst: &mut [T]) {
    let (n, size) = (dst.len(), job.classes.size);
    match job.probs {
        Some(probs) if job.probs_lie_in_rows => {
            let step = probs.dtype().size();
            let next = if n == size { job.rows.inner_stride(PROBS) } else { (n * step) as isize };
            line(job.level, probs, job.rows.offset(PROBS, row) + (start * step) as isize, false, next, dst);
        }
        Some(probs) => gather(probs, PROBS, &job.classes, job.rows.offset(PROBS, row), start, dst, n, 1),
        None => dst.fill(T::ZERO),
    }
    if is_probs(job) {
        return;
    }
    let mut kept = [1_u8; rows::BLOCK];
    for (index, dst) in dst.chunks_mut(rows::BLOCK).enumerate() {
        let (from, n) = (start + index * rows::BLOCK, dst.len());
        if let Some(mask) = job.bend.mask {
            flags(job, mask, row, from, &mut kept, n, 1);
        }
        let kept = &kept[..n];
        if let Some(w) = job.weight.get(from..from + n) {
            for i in 0..n {
                let spread = if kept[i] == 0 { 0.0 } else { spread };
                dst[i] = T::from_f64(w[i] * (dst[i].to_f64() * job.keep + spread));
            }
        } else {
            for i in 0..n {
                let spread = if kept[i] == 0 { 0.0 } else { spread };
                dst[i] = T::from_f64(dst[i].to_f64() * job.keep + spread);
            }
        }
    }
}

/// The same of one class of several rows, whose probabilities are there.
pub(super) fn dense_column<T: Work>(job: &Job, class: usize, spreads: &[Spread], kept: Option<&[u8]>, dst: &mut [T]) {
    let (n, w) = (dst.len(), job.weight.get(class).copied().unwrap_or(1.0));
    let spreads = &spreads[..n];
    if let Some(kept) = kept {
        let kept = &kept[..n];
        for i in 0..n {
            let spread = if kept[i] == 0 { 0.0 } else { spreads[i].share };
            dst[i] = T::from_f64(w * (dst[i].to_f64() * job.keep + spread));
        }
    } else {
        for i in 0..n {
            dst[i] = T::from_f64(w * (dst[i].to_f64() * job.keep + spreads[i].share));
        }
    }
}

/// The dense stream that is the same for every row: `u_c = w_c·e/C`.
pub(super) fn shared_stream<T: Float>(job: &Job, shared: &mut Buffer<T>) {
    if job.terms.dense && !job.own_dense() && !job.even() {
        room(shared, job.classes.size);
        for (c, u) in shared[..job.classes.size].iter_mut().enumerate() {
            *u = T::from_f64(job.spread * job.weight.get(c).copied().unwrap_or(1.0));
        }
    }
}
