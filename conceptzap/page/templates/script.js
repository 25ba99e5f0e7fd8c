"use strict";
const large = document.getElementById("large");
const [below, over] = large.querySelectorAll("img");
const slider = large.querySelector("input");
const slide = () => { over.style.clipPath = `inset(0 0 0 ${100 - slider.value}%)`; };

function enlarge(pair) {
  const [before, after] = pair.querySelectorAll("img");
  const command = pair.querySelector(".copy").dataset.copy;
  for (const [image, from] of [[below, before], [over, after]]) {
    image.src = from.src;
    image.classList.toggle("px", from.classList.contains("px"));
  }
  large.querySelector(".asked").textContent = pair.querySelector("figcaption").textContent;
  large.querySelector(".labels").textContent = `${before.title}\n\n${after.title}`;
  large.querySelector("code").textContent = command;
  large.querySelector(".copy").dataset.copy = command;
  slider.value = 50;
  slide();
  large.showModal();
}

async function copy(button) {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
  } catch {
    window.prompt("copy this:", button.dataset.copy);
  }
  setTimeout(() => { button.textContent = said; }, 1200);
}

slider.addEventListener("input", slide);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (event.target === large || button?.matches(".close")) large.close();
  else if (button?.matches(".zoom")) enlarge(button.closest(".pair"));
  else if (button?.matches(".copy")) copy(button);
});
