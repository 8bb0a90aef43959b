"""Importing packscore starts nothing and changes nothing in the process."""

from __future__ import annotations

import pytest

from processes import run_fresh


def test_import_loads_nothing_and_changes_no_environment() -> None:
    out = run_fresh(
        """
        import os, sys
        before = dict(os.environ)
        import packscore
        assert dict(os.environ) == before
        heavy = {"jax", "torchax", "torch", "transformers", "numpy"} & set(sys.modules)
        assert not heavy, heavy
        print(packscore.__version__)
        """
    )
    assert out.strip()


@pytest.mark.jax
def test_every_module_leaves_the_process_as_it_was() -> None:
    """Environment, torch defaults and Hugging Face registries; none but programs brings jax."""
    run_fresh(
        """
        import importlib, os, pathlib, sys, threading, warnings
        import torch, transformers
        from transformers import pipelines
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        def state():
            return {
                "environ": dict(os.environ),
                "attention": dict(AttentionInterface._global_mapping),
                "masks": dict(AttentionMaskInterface._global_mapping),
                "pipelines": sorted(pipelines.PIPELINE_REGISTRY.supported_tasks),
                "dtype": torch.get_default_dtype(),
                "device": torch.get_default_device(),
                "threads": torch.get_num_threads(),
                "grad": torch.is_grad_enabled(),
                "determinism": torch.are_deterministic_algorithms_enabled(),
                "seed": torch.initial_seed(),
                "precision": torch.get_float32_matmul_precision(),
                "mha_fastpath": torch.backends.mha.get_fastpath_enabled(),
                "accelerator": torch.accelerator.is_available(),
                "running": sorted(thread.name for thread in threading.enumerate()),
                "filters": list(warnings.filters),
            }

        before = state()
        import packscore
        # programs are for patch_model(..., device=...); the others extend classes of packages that
        # change warnings and the environment when imported
        programs = "packscore.programs"
        own = ("cross_encoder", "cross_encoder_base", "langchain", "llama_index", "rerankers")
        extending = {"packscore.plot", *(f"packscore.integrations.{name}" for name in own)}
        folder = pathlib.Path(packscore.__file__).parent
        files = (path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py"))
        found = {".".join(file.parts).removesuffix(".__init__") for file in files} - {"packscore"}
        assert extending < found
        modules = {name for name in found if not name.startswith(programs)}
        for name in sorted(modules - extending):
            importlib.import_module(name)
        for name in packscore.__all__:
            if packscore._HOME_OF[name] in modules - extending:
                getattr(packscore, name)
        after = state()
        for key in before:
            assert before[key] == after[key], key
        assert not torch.cuda.is_initialized()
        for name in sorted(extending):
            importlib.import_module(name)
        assert not {"jax", "jaxlib", "torchax"} & set(sys.modules)
        from packscore import ModelProgram
        assert ModelProgram.__module__.startswith(programs)
        assert "jax" in sys.modules
        """
    )


def test_scoring_in_torch_never_imports_jax() -> None:
    run_fresh(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM
        from packscore import MultiItemScorer, patch_model, shipped_model_path
        model = AutoModelForCausalLM.from_pretrained(shipped_model_path()).eval()
        scorer = MultiItemScorer(patch_model(model), label_token_ids=[1, 2])
        scorer.rank([1, 2], [[3], [4]])
        assert "jax" not in sys.modules
        assert "torchax" not in sys.modules
        """
    )


@pytest.mark.jax
def test_kernels_need_no_torch() -> None:
    run_fresh(
        """
        import sys
        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "torchax", "transformers", "packscore"):
                    raise ImportError(name)
        sys.meta_path.insert(0, NoTorch())
        import packscore_kernels
        layout = packscore_kernels.SegmentLayout.single(3, [2, 1])
        assert layout.segment_ids.tolist() == [0, 0, 0, 1, 1, 2]
        assert "jax" not in sys.modules
        import packscore_kernels.attention.reference
        from packscore_kernels import segment_paged_attention
        assert callable(segment_paged_attention)
        assert "jax" in sys.modules
        """
    )


def test_public_names_are_listed_and_unknown_ones_refused() -> None:
    run_fresh(
        """
        import packscore
        assert set(packscore.__all__) <= set(dir(packscore))
        assert set(packscore._HOME_OF) == set(packscore.__all__)
        try:
            packscore.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise SystemExit("an unknown name was accepted")
        """
    )
