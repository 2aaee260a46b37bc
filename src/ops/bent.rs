//! Tiles of logits that softcap and mask bend, and what that does to their gradients.

use crate::array::{Flags, Span, SpanMut};
use crate::kernels::bend::{self, Mask};
use crate::kernels::finish::WIDTH;
use crate::simd::Level;

use super::job::MASK;
use super::scratch::{Buffer, Work, room};
use super::source::{capped, flags};
use super::stream::{Spread, spreads};
use super::strip::Strip;

/// How the logits of a tile were bent: the slopes of the softcap, and the mask, as in the tile.
#[derive(Default)]
pub(super) struct Bent<T> {
    slopes: Buffer<T>,
    pub(super) mask: Truth,
}

impl<T: Work> Bent<T> {
    /// Bends the first `count` classes of a tile, which are those from `first` on; to be undone if there is a gradient.
    pub(super) fn bend(&mut self, strip: &Strip, x: &mut [T], stride: usize, (first, count): (usize, usize), gradient: bool) {
        let (job, rows) = (strip.job, strip.kept.len());
        let x = &mut x[..count * stride];
        if let Some(cap) = job.bend.softcap {
            let kept = if gradient { x.len() } else { 0 };
            let slopes = &mut room(&mut self.slopes, kept)[..kept];
            // The kept rows of each class, all at once where nothing lies between.
            let (step, len) = if rows == stride { (x.len(), x.len()) } else { (stride, rows) };
            for start in (0..x.len()).step_by(step.max(1)) {
                capped(job.level, cap, &mut x[start..start + len], slopes.get_mut(start..start + len).unwrap_or_default());
            }
        }
        if job.bend.mask.is_some() {
            self.mask.fill(strip, stride, (first, count));
            self.masked(job.level, x, T::NEG_INF);
        }
    }

    /// Sets what is under False.
    fn masked(&self, level: Level, x: &mut [T], to: T) {
        let dst = SpanMut::of(x);
        level.run(Mask { mask: Flags::of(&self.mask.0), to, x: dst.read(), dst, ahead: core::ptr::null() });
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

/// The mask of a tile.
#[derive(Default)]
pub(super) struct Truth(Vec<u8>);

impl Truth {
    fn fill(&mut self, strip: &Strip, stride: usize, (first, count): (usize, usize)) {
        let Strip { job, kept, run } = *strip;
        let Some(array) = job.bend.mask else { return };
        self.0.resize(self.0.len().max(count * stride), 1);
        if run && job.classes.is_line() && kept.len() >= count {
            let (base, step) = (job.rows.offset(MASK, kept[0]), job.classes.inner_stride(MASK));
            for (c, line) in self.0.chunks_mut(stride).enumerate().take(count) {
                array.read_flags(base + (first + c) as isize * step, job.rows.inner_stride(MASK), kept.len(), line, 1);
            }
        } else {
            for (slot, &row) in kept.iter().enumerate() {
                flags(job, array, row, first, self.0.get_mut(slot..).unwrap_or_default(), count, stride);
            }
        }
    }

    /// That of the class at `c`, if there is one.
    pub(super) fn line(&self, strip: &Strip, c: usize, stride: usize) -> Option<&[u8]> {
        strip.job.bend.mask.map(|_| &self.0[c * stride..][..strip.kept.len()])
    }

    /// As [`spreads`], of a tile that has all classes.
    pub(super) fn spreads(&self, strip: &Strip, stride: usize) -> Vec<Spread> {
        let Strip { job, kept, .. } = *strip;
        if job.bend.mask.is_none() || job.spread == 0.0 {
            return spreads(strip);
        }
        let mut counts = [0_u32; WIDTH];
        for line in (0..job.classes.size).filter_map(|c| self.line(strip, c, stride)) {
            counts.iter_mut().zip(line).for_each(|(count, &kept)| *count += u32::from(kept != 0));
        }
        kept.iter().zip(counts).map(|(&row, count)| Spread::over(job, row, count as usize)).collect()
    }
}
