//! Batch operations: shapes, axes, options, reductions and threads over the kernels.

#![forbid(unsafe_code)]

mod api;
mod bandwidth;
mod bent;
mod blocks;
mod by_columns;
mod by_rows;
mod entry;
mod few;
mod job;
mod kl;
mod plan;
mod results;
mod score;
mod scratch;
mod segments;
mod source;
mod straight;
mod stream;
mod strip;
mod targets;
mod tiles;
mod topk;
mod vjp;

pub use api::{Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};
pub use bandwidth::{Traffic, bandwidth};
pub use entry::{cross_entropy, log_softmax, logsumexp, small_cross_entropy, softmax};
pub use kl::kl_divergence;
pub use score::{Scores, score_tokens};
pub use topk::topk_logprobs;
pub use vjp::{log_softmax_vjp, nll_loss, softmax_vjp};

/// Most elements of [`small_cross_entropy`].
pub const SMALL_SIZE: usize = few::SMALL_SIZE;
