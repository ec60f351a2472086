//! The handshake as a peer of any mind leads it: it ends, and each option has its answer.

use nbdtrack::correlation::RefusalKind;
use nbdtrack::image::BlockSizes;
use nbdtrack::nbd::handshake::{ExpectFlags, Facts, Next, Refusal};

use super::Input;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let flags = u32::from(input.byte());
    let Ok(state) = ExpectFlags.on_flags(flags) else {
        return;
    };
    let mut next = Next::ExpectOption(state);
    while !input.is_empty() {
        let Next::ExpectOption(state) = next else {
            return;
        };
        let (option, how) = (u32::from(input.byte() % 14), input.byte());
        let length = usize::from(input.short() % 600).min(input.0.len());
        let (option_data, rest) = input.0.split_at(length);
        input.0 = rest;
        let mut out = Vec::new();
        next = if how & 0x80 != 0 {
            state.on_oversized(option, &mut out)
        } else {
            state.on_option(option, option_data, how & 0x40 != 0, &mut out)
        };
        next = follow(next, how, &mut out);
        // EXPORT_NAME has no way to refuse, ABORT may go unanswered, and a peer that breaks the rules hears nothing more.
        let silent = matches!(option, 1 | 2) || matches!(next, Next::Closed(_));
        assert!(
            silent || !out.is_empty(),
            "option {option} without an answer"
        );
        assert!(out.len() < 1 << 20, "{} bytes for {length}", out.len());
    }
}

fn follow(next: Next, how: u8, out: &mut Vec<u8>) -> Next {
    let refusal = || Refusal {
        kind: [
            RefusalKind::NotAvailable,
            RefusalKind::Policy,
            RefusalKind::ShuttingDown,
        ][usize::from(how >> 4) % 3],
        reason: "not now".to_owned(),
    };
    let refused = how & 1 != 0;
    match next {
        Next::List(list) => {
            let names = ["a", "b"].iter().copied();
            list.answer((!refused).then_some(names), out)
        }
        Next::Contexts(contexts) => {
            assert!(contexts.name().len() <= 4096);
            contexts.answer(if refused { Err(refusal()) } else { Ok(()) }, out)
        }
        Next::Choose(choose) => {
            assert!(choose.name().len() <= 4096);
            choose.answer(
                if refused {
                    Err(refusal())
                } else {
                    Ok(facts(how))
                },
                out,
            )
        }
        other => other,
    }
}

fn facts(how: u8) -> Facts {
    Facts {
        size: 1 << 20,
        read_only: how & 2 != 0,
        can_discard: how & 4 != 0,
        blocks: BlockSizes {
            min: 1,
            preferred: 4096,
            max: 32 << 20,
        },
        rotational: how & 8 != 0,
    }
}
