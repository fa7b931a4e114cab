"""BibTeX of the methods and of what they share."""

BIBTEX = {
    "weights": """@inproceedings{li2026learning,
  title={Learning to Weight Parameters for Training Data Attribution},
  author={Li, Shuangqi and Le, Hieu and Xu, Jingyi and Salzmann, Mathieu},
  booktitle={International Conference on Learning Representations},
  year={2026},
  note={arXiv:2506.05647}
}""",
    "tracin": """@inproceedings{pruthi2020tracin,
  title={Estimating Training Data Influence by Tracing Gradient Descent},
  author={Pruthi, Garima and Liu, Frederick and Kale, Satyen and Sundararajan, Mukund},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
    "grad_cos": """@inproceedings{charpiat2019input,
  title={Input Similarity from the Neural Network Perspective},
  author={Charpiat, Guillaume and Girard, Nicolas and Felardos, Loris and Tarabalka, Yuliya},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}""",
    "trak": """@inproceedings{park2023trak,
  title={{TRAK}: Attributing Model Behavior at Scale},
  author={Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and Leclerc, Guillaume and
          Madry, Aleksander},
  booktitle={International Conference on Machine Learning},
  year={2023}
}""",
    "logra": """@article{choe2024logra,
  title={What is Your Data Worth to {GPT}? {LLM}-Scale Data Valuation with Influence Functions},
  author={Choe, Sang Keun and Ahn, Hwijeen and Bae, Juhan and Zhao, Kewen and Kang, Minsoo and
          Chung, Youngseog and Pratapa, Adithya and Neiswanger, Willie and Strubell, Emma and
          Mitamura, Teruko and Schneider, Jeff and Hovy, Eduard and Grosse, Roger and Xing, Eric},
  journal={arXiv:2405.13954},
  year={2024}
}""",
    "d_trak": """@inproceedings{zheng2024dtrak,
  title={Intriguing Properties of Data Attribution on Diffusion Models},
  author={Zheng, Xiaosen and Pang, Tianyu and Du, Chao and Jiang, Jing and Lin, Min},
  booktitle={International Conference on Learning Representations},
  year={2024},
  note={arXiv:2311.00500}
}""",
    "journey_trak": """@article{georgiev2023journey,
  title={The Journey, Not the Destination: How Data Guides Diffusion Models},
  author={Georgiev, Kristian and Vendrow, Joshua and Salman, Hadi and Park, Sung Min and
          Madry, Aleksander},
  journal={arXiv:2312.06205},
  year={2023}
}""",
    "das": """@inproceedings{lin2025das,
  title={Diffusion Attribution Score: Evaluating Training Data Influence in Diffusion Models},
  author={Lin, Jinxu and Tao, Linwei and Dong, Minjing and Xu, Chang},
  booktitle={International Conference on Learning Representations},
  year={2025}
}""",
    "kfac": """@inproceedings{martens2015kfac,
  title={Optimizing Neural Networks with Kronecker-factored Approximate Curvature},
  author={Martens, James and Grosse, Roger},
  booktitle={International Conference on Machine Learning},
  year={2015}
}""",
    "ekfac": """@article{grosse2023studying,
  title={Studying Large Language Model Generalization with Influence Functions},
  author={Grosse, Roger and Bae, Juhan and Anil, Cem and Elhage, Nelson and Tamkin, Alex and
          others},
  journal={arXiv:2308.03296},
  year={2023}
}""",
    "eshampoo": """@inproceedings{eschenhagen2025purifying,
  title={Purifying {Shampoo}: Investigating {Shampoo}'s Heuristics by Decomposing its
         Preconditioner},
  author={Eschenhagen, Runa and Defazio, Aaron and Lee, Tsung-Hsien and Turner, Richard E. and
          Shi, Hao-Jun Michael},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
  note={arXiv:2506.03595}
}""",
    "shampoo": """@inproceedings{gupta2018shampoo,
  title={{Shampoo}: Preconditioned Stochastic Tensor Optimization},
  author={Gupta, Vineet and Koren, Tomer and Singer, Yoram},
  booktitle={International Conference on Machine Learning},
  year={2018}
}""",
    "trackstar": """@inproceedings{chang2025trackstar,
  title={Scalable Influence and Fact Tracing for Large Language Model Pretraining},
  author={Chang, Tyler A. and Rajagopal, Dheeraj and Bolukbasi, Tolga and Dixon, Lucas and
          Tenney, Ian},
  booktitle={International Conference on Learning Representations},
  year={2025},
  note={arXiv:2410.17413}
}""",
    "magic": """@article{ilyas2025magic,
  title={{MAGIC}: Near-Optimal Data Attribution for Deep Learning},
  author={Ilyas, Andrew and Engstrom, Logan},
  journal={arXiv:2504.16430},
  year={2025}
}""",
    "replay": """@article{engstrom2025optimizing,
  title={Optimizing {ML} Training with Metagradient Descent},
  author={Engstrom, Logan and Ilyas, Andrew and Chen, Benjamin and Feldmann, Axel and
          Moses, William and Madry, Aleksander},
  journal={arXiv:2503.13751},
  year={2025}
}""",
    "source": """@inproceedings{bae2024training,
  title={Training Data Attribution via Approximate Unrolled Differentiation},
  author={Bae, Juhan and Lin, Wu and Lorraine, Jonathan and Grosse, Roger},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024},
  note={arXiv:2405.12186}
}""",
    "astra": """@article{wang2025better,
  title={Better Training Data Attribution via Better Inverse {Hessian}-Vector Products},
  author={Wang, Andrew and Nguyen, Elisa and Yang, Runshi and Bae, Juhan and McIlraith, Sheila A.
          and Grosse, Roger},
  journal={arXiv:2507.14740},
  year={2025}
}""",
    "influence": """@inproceedings{koh2017understanding,
  title={Understanding Black-box Predictions via Influence Functions},
  author={Koh, Pang Wei and Liang, Percy},
  booktitle={International Conference on Machine Learning},
  year={2017}
}""",
    "data_inf": """@inproceedings{kwon2024datainf,
  title={{DataInf}: Efficiently Estimating Data Influence in {LoRA}-tuned {LLMs} and Diffusion
         Models},
  author={Kwon, Yongchan and Wu, Eric and Wu, Kevin and Zou, James},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    "grass": """@inproceedings{hu2025grass,
  title={{GraSS}: Scalable Data Attribution with Gradient Sparsification and Sparse Projection},
  author={Hu, Pingbang and Melkonian, Joseph and Tang, Weijing and Zhao, Han and Ma, Jiaqi W.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
  note={arXiv:2505.18976}
}""",
}
