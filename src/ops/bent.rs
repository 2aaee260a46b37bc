//! Tiles of logits that softcap and mask bend, and what that does to their gradients.

use crate::array::{Flags, Span, SpanMut};
use crate::kernels::bend::{self, Mask};
use crate::simd::Level;

use super::job::MASK;
use super::scratch::{Buffer, Work, room};
use super::source::{capped, flags};
use super::strip::Strip;

/// How the logits of a tile were bent: the slopes of the softcap, and the mask, as in the tile.
#[derive(Default)]
pub(super) struct Bent<T> {
    slopes: Buffer<T>,
    mask: Vec<u8>,
}

impl<T: Work> Bent<T> {
    /// Bends the first `count` classes of a tile, which are those from `first` on; to be undone if there is a gradient.
    pub(super) fn bend(&mut self, strip: &Strip, x: &mut [T], stride: usize, (first, count): (usize, usize), gradient: bool) {
        let (job, rows) = (strip.job, strip.kept.len());
        let x = &mut x[..count * stride];
        if let Some(cap) = job.bend.softcap {
            let slopes = room(&mut self.slopes, if gradient { x.len() } else { 0 });
            let slopes = &mut slopes[..if gradient { x.len() } else { 0 }];
            // The kept rows of each class, all at once where nothing lies between.
            let (step, len) = if rows == stride { (x.len(), x.len()) } else { (stride, rows) };
            for start in (0..x.len()).step_by(step.max(1)) {
                capped(job.level, cap, &mut x[start..start + len], slopes.get_mut(start..start + len).unwrap_or_default());
            }
        }
        let Some(array) = job.bend.mask.filter(|_| count > 0) else { return };
        self.mask.resize(self.mask.len().max(x.len()), 1);
        if strip.run && job.classes.is_line() {
            let (base, step) = (job.rows.offset(MASK, strip.kept[0]), job.classes.inner_stride(MASK));
            for (c, line) in self.mask.chunks_mut(stride).enumerate().take(count) {
                array.read_flags(base + (first + c) as isize * step, job.rows.inner_stride(MASK), rows, line, 1);
            }
        } else {
            for (slot, &row) in strip.kept.iter().enumerate() {
                flags(job, array, row, first, &mut self.mask[slot..], count, stride);
            }
        }
        self.masked(job.level, x, T::NEG_INF);
    }

    /// Sets what is under False.
    fn masked(&self, level: Level, x: &mut [T], to: T) {
        let dst = SpanMut::of(x);
        level.run(Mask { mask: Flags::of(&self.mask), to, x: dst.read(), dst, ahead: core::ptr::null() });
    }

    /// Multiplies gradients by what bending did to the logits.
    pub(super) fn unbend(&self, strip: &Strip, gradient: &mut [T]) {
        let job = strip.job;
        if job.bend.softcap.is_some() {
            bend::multiply(job.level, SpanMut::of(gradient), Span::of(&self.slopes));
        }
        if job.bend.mask.is_some() {
            self.masked(job.level, gradient, T::ZERO);
        }
    }
}
