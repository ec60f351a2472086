//! The scenarios. Each test's name is its claim; the module's name is what `SCENARIO=` takes.

/// Makes a module with one test for each machine type from a function that takes the shape.
macro_rules! scenario {
    ($name:ident, $claim:ident) => {
        mod $name {
            use crate::machine::Shape;
            use support::Outcome;

            mod pc {
                use super::*;
                #[test]
                fn $claim() -> Outcome<()> {
                    super::super::$claim(Shape::Pc)
                }
            }
            mod q35 {
                use super::*;
                #[test]
                fn $claim() -> Outcome<()> {
                    super::super::$claim(Shape::Q35)
                }
            }
        }
    };
}

mod claims;
mod control;
mod daemon;
mod files;
mod hasty;
mod identities;
mod jobs;
mod kernel_client;
mod moves;
mod nfs;
mod packaging;
mod power;
mod swap;
mod trouble;
mod twins;
